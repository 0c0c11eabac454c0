"""Requests of sessions in a real engine: each is the plain one whose prompt has what it read."""

from threading import Thread
from types import SimpleNamespace

import pytest
from engines import BLOCK_SIZE, engine
from session_truth import Truth
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.sessions.admission import admit, ended, session_counts

MODEL = "scripts/tiny"
PLACES = ["oslo", "lima", "rome", "paris", "cairo", "delhi", "quito", "tokyo", "dakar", "sofia"]
NUMBERS = dict(zip(PLACES, range(11, 99, 9), strict=False))
TOLD = [
    " ".join(
        f"The magic number of {p} is {NUMBERS[p]}. About {p} there is more to say." for p in part
    )
    for part in (PLACES[:5], PLACES[5:])
]
MEMORY = {"preset": "official", "layers": [1, 3], "bank_size": 23, "segment_size": 64}
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def serving(pace=None, **settings):
    pace = {"session_tokens": 10000, **({"layers": []} if pace is None else pace)}
    return engine(MODEL, pace, **{"skip_tokenizer_init": False, **settings})


def ask(running, prompts, extra, salts=None, **sampling):
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    for prompt, salt in zip(given, salts or [None] * len(given), strict=True):
        if salt is not None:
            prompt["cache_salt"] = salt
    params = [
        SamplingParams(
            **{
                "temperature": 0,
                "ignore_eos": True,
                "max_tokens": MAX_TOKENS,
                "extra_args": each,
                **sampling,
            }
        )
        for each in extra
    ]
    return running.llm.generate(given, params, use_tqdm=False)


def own(name, **more):
    return {"pacellm_session": name, **{f"pacellm_session_{key}": v for key, v in more.items()}}


def question(tokenizer, place):
    return tokenizer.encode(f"What is the magic number of {place}?\nThe magic number of {place} is")


def script(tokenizer):
    """(session, salt, prompt): two sessions and two tenants by turns."""
    turns = []
    for n, place in enumerate(("oslo", "quito", "rome", "dakar")):
        for name, salt, told in (("a", None, TOLD[0]), ("b", None, TOLD[1]), ("a", "t", TOLD[1])):
            if n == 0:
                turns.append((name, salt, tokenizer.encode(told)))
            turns.append((name, salt, question(tokenizer, place)))
    return turns


SCHEDULES = {
    "without memory": (None, {}),
    "with memory": (MEMORY, {}),
    "small chunks, no caching": (
        MEMORY,
        {"max_num_batched_tokens": 40, "enable_prefix_caching": False},
    ),
    "two ranks": (MEMORY, {"tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_request_is_the_plain_one_with_what_it_read(schedule, tokenizer):
    pace, settings = SCHEDULES[schedule]
    truths = {}
    with serving(pace, **settings) as running:
        for name, salt, prompt in script(tokenizer):
            truth = truths.setdefault((name, salt), Truth(tokenizer))
            [output] = ask(running, [prompt], [own(name)], [salt])
            assert output.prompt_token_ids == truth.read(prompt)
            answer = list(output.outputs[0].token_ids)
            [plain] = ask(running, [output.prompt_token_ids], [None])
            assert answer == list(plain.outputs[0].token_ids)
            truth.write(prompt, answer)
        for (_, salt), truth in truths.items():
            told = "".join(map(tokenizer.decode, truth.prompts[:1]))
            for place in PLACES:
                asked = question(tokenizer, place)
                assert (len(truth.read(asked)) > len(asked) + 100) == (place in told), salt
        assert session_counts(running.llm.llm_engine.input_processor)["sessions"] == 3
        assert running.all_blocks_are_back()


def test_requests_sent_together_read_what_was_there_before(tokenizer):
    # Blocks for about two of the six at a time, so some are preempted.
    few = {"num_gpu_blocks_override": 900 // BLOCK_SIZE, "max_num_batched_tokens": 64}
    asked = [question(tokenizer, place) for place in PLACES[:6]]
    with serving(MEMORY, enable_prefix_caching=False, max_model_len=512, **few) as running:
        truth = Truth(tokenizer)
        for told in TOLD:
            [output] = ask(running, [tokenizer.encode(told)], [own("a")])
            truth.write(tokenizer.encode(told), output.outputs[0].token_ids)
        outputs = ask(running, asked, [own("a")] * 6, max_tokens=90)
        assert running.metric("vllm:num_preemptions") > 0
        for prompt, output in zip(asked, outputs, strict=True):
            assert output.prompt_token_ids == truth.read(prompt)
            [plain] = ask(running, [output.prompt_token_ids], [None], max_tokens=90)
            assert output.outputs[0].token_ids == plain.outputs[0].token_ids


def test_what_is_said_with_a_session(tokenizer):
    told, asked = tokenizer.encode(TOLD[0]), question(tokenizer, "rome")
    with serving() as running:
        # Nothing is written.
        ask(running, [told], [own("a", write=False)])
        [output] = ask(running, [asked], [own("a", write=0)])
        assert output.prompt_token_ids == asked
        # An abort leaves nothing.
        llm = running.llm.llm_engine
        llm.add_request(
            "gone", {"prompt_token_ids": told}, SamplingParams(max_tokens=50, extra_args=own("a"))
        )
        llm.step()
        llm.abort_request(["gone"])
        while llm.has_unfinished_requests():
            llm.step()
        [output] = ask(running, [asked], [own("a", write=False)])
        assert output.prompt_token_ids == asked
        ask(running, [told], [own("a")])
        counts = session_counts(llm.input_processor)
        # Never, and a question about something else.
        [output] = ask(running, [asked], [own("a", read="never", write=False)])
        assert output.prompt_token_ids == asked
        other = tokenizer.encode("Nobody knows when birds sleep.")
        [output] = ask(running, [other], [own("a", write=False)])
        assert output.prompt_token_ids == other
        [output] = ask(running, [asked], [own("a", write=False)])
        assert len(output.prompt_token_ids) > len(asked) + 100
        # Memory off is not the session off.
        off = {"pacellm_enabled": False}
        [again] = ask(running, [asked], [{**own("a", write=False), **off}])
        assert again.prompt_token_ids == output.prompt_token_ids
        # A client's word of what was read, which would leave nothing of a prompt, is not taken.
        reader = llm.input_processor._pacellm_sessions
        forged = {"reading_of_pacellm": [reader.id, 0, len(told)]}
        [plain] = ask(running, [asked], [forged])
        assert plain.prompt_token_ids == asked
        assert session_counts(llm.input_processor) == counts
        ask(running, [told], [{**own("b"), **forged}])
        [output] = ask(running, [asked], [own("b", write=False)])
        assert len(output.prompt_token_ids) > len(asked) + 100


def test_a_request_without_a_session_is_the_same_as_without_sessions(tokenizer):
    prompts = [tokenizer.encode(TOLD[0]), question(tokenizer, "rome")]
    with engine(MODEL, MEMORY, skip_tokenizer_init=False) as running:
        alone = ask(running, prompts, [None, None], logprobs=1)
    with serving(MEMORY) as running:
        ask(running, prompts[:1], [own("a")])
        running.llm.reset_prefix_cache()
        beside = ask(running, prompts, [None, None], logprobs=1)
    assert [o.outputs[0].logprobs for o in alone] == [o.outputs[0].logprobs for o in beside]


def test_what_is_read_fits_beside_the_answer(tokenizer):
    told, asked = tokenizer.encode(" ".join(TOLD)), question(tokenizer, "rome")
    longest = 360
    room = longest - len(asked)
    with serving(max_model_len=longest) as running:
        ask(running, [told[:350]], [own("a")])
        many = (1, 20, 100, 200, 300, room)
        params = [
            SamplingParams(
                temperature=0,
                ignore_eos=True,
                max_tokens=max_tokens,
                extra_args=own("a", write=False, read="always"),
            )
            for max_tokens in many
        ]
        given = [{"prompt_token_ids": asked}] * len(many)
        outputs = running.llm.generate(given, params, use_tqdm=False)
    read = [len(output.prompt_token_ids) for output in outputs]
    answers = [len(output.outputs[0].token_ids) for output in outputs]
    assert answers == [*many[:-1], longest - read[-1]]
    assert all(sum(each) <= longest for each in zip(read, answers, strict=True))
    # Who takes all the room there is has three quarters of it read at most.
    assert len(asked) < read[-1] <= len(asked) + room * 3 // 4 < read[0]


@pytest.mark.parametrize(
    ("extra", "sampling", "why"),
    [
        (own("a"), {"n": 2}, "a session goes on with one answer, not n = 2"),
        ({"pacellm_session_read": "never"}, {}, "sets session_read must name a session"),
        (own("a", read="maybe"), {}, '"auto", "always" or "never"'),
        (own(""), {}, "a name of 1 to 256 characters"),
        (own("x" * 257), {}, "a name of 1 to 256 characters"),
        (own(7), {}, "a name of 1 to 256 characters"),
    ],
)
def test_what_is_refused_of_a_request(extra, sampling, why, refusing):
    with pytest.raises((ValueError, VLLMValidationError), match=why):
        ask(refusing, [[5, 6]], [extra], **{"temperature": 1, **sampling})


@pytest.fixture(scope="module")
def refusing():
    with serving(enable_prompt_embeds=True) as running:
        yield running


def test_streamed_input_and_embeddings_are_refused(refusing):
    import torch

    llm = refusing.llm.llm_engine
    params = SamplingParams(max_tokens=2, extra_args=own("a"))
    with pytest.raises(VLLMValidationError, match="streamed input is none"):
        llm.input_processor.process_inputs(
            "s", {"prompt_token_ids": [5]}, params, llm.get_supported_tasks(), resumable=True
        )
    width = llm.vllm_config.model_config.get_hidden_size()
    with pytest.raises(VLLMValidationError, match="a prompt of embeddings is none"):
        refusing.llm.generate([{"prompt_embeds": torch.zeros(3, width)}], params, use_tqdm=False)


def request_of(tokens, **more):
    given = {"request_id": "r", "prompt_token_ids": tokens, "cache_salt": None, "resumable": False}
    given |= {"prompt_embeds": None, "mm_features": None}
    params = SamplingParams(max_tokens=2, extra_args=own("a"))
    return SimpleNamespace(**{**given, "sampling_params": params, **more})


def front_end(get_tokenizer):
    model = SimpleNamespace(max_model_len=400)
    return SimpleNamespace(vllm_config=None, model_config=model, get_tokenizer=get_tokenizer)


def admitted(processor, request):
    config = PaceConfig.from_sources({"session_tokens": 1000, "layers": []})
    admit(processor, request, lambda vllm_config: config)
    return request


# vLLM 0.32 has no prompt_logprob_token_ids.
CHOSEN = SimpleNamespace(n=1, extra_args=own("a"), prompt_logprob_token_ids=[[7]])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mm_features": ["a picture"]}, "a session keeps text, and pictures is none"),
        ({"sampling_params": CHOSEN}, "has a row for each token of the prompt"),
    ],
    ids=["pictures", "chosen logprobs"],
)
def test_what_text_cannot_be_added_to_is_refused(more, why):
    with pytest.raises(PaceConfigError, match=why):
        admitted(front_end(None), request_of([5, 6], **more))


def test_requests_that_come_at_once_have_one_reader(tokenizer):
    made, other = [], []

    def get_tokenizer():
        made.append(tokenizer)
        if len(made) == 1:
            other.append(Thread(target=admitted, args=(processor, request_of([7]))))
            other[0].start()
            # It ends where nothing holds it up.
            other[0].join(0.2)
        return tokenizer

    processor = front_end(get_tokenizer)
    admitted(processor, request_of([5, 6]))
    other[0].join()
    assert len(made) == 1


def test_what_is_in_use_is_neither_read_nor_written(tokenizer):
    processor = front_end(lambda: tokenizer)
    leave = ended(admitted(processor, request_of([5, 6])))
    uses = (lambda: admitted(processor, request_of([5, 6])), lambda: leave([7]))
    for use in uses:
        thread = Thread(target=use)
        with processor._pacellm_sessions.store.lock:
            thread.start()
            # It ends where nothing holds it up.
            thread.join(0.2)
            assert thread.is_alive()
        thread.join()
    assert session_counts(processor)["tokens"] == 3


def test_an_engine_without_sessions_refuses_them():
    with (
        engine(MODEL, MEMORY, skip_tokenizer_init=False) as running,
        pytest.raises(VLLMValidationError, match="keeps no sessions; serve with session_tokens"),
    ):
        ask(running, [[5, 6]], [own("a")])


def test_an_engine_without_tokenizer_is_refused():
    with (
        pytest.raises(
            (PaceConfigError, ValueError), match="session_tokens does not work with no tok"
        ),
        serving(skip_tokenizer_init=True),
    ):
        pass
