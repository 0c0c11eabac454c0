"""Sessions of streamed input: turns of one request, whose bank goes on from turn to turn."""

import json

import pytest
from checkpoints import make_prompt
from engines import BLOCK_SIZE, NATIVE, engine
from oracle import OracleModel
from servers import printed_by
from test_engine_oracle import GAP
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
OFF = {"pacellm_enabled": False}
ASKS = {"on": None, "off": OFF, "another alpha": {"pacellm_alpha": 0.7}}
MAX_TOKENS = 20


def truth(oracle, prompts, ask):
    """Each turn's tokens. The last token that a turn sampled is not read by the next."""
    own = {"alpha": 0.0} if ask == OFF else {"alpha": (ask or {}).get("pacellm_alpha", 0.2)}
    oracle._reset(own)
    said = []
    for prompt in prompts:
        tokens = [int(oracle._feed(prompt)[-1].argmax())]
        while len(tokens) < MAX_TOKENS:
            tokens.append(int(oracle._feed(tokens[-1:])[-1].argmax()))
        said.append(tokens)
    return said, min(bank.closest_call for bank in oracle.banks.values())


def add_turn(running, name, prompt, ask, first):
    core = running.llm.llm_engine
    params = SamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args=ask,
        output_kind=RequestOutputKind.DELTA,
    )
    request = core.input_processor.process_inputs(
        name,
        {"prompt_token_ids": list(prompt)},
        params,
        supported_tasks=core.get_supported_tasks(),
        resumable=True,
    )
    request.external_req_id = name
    if first:
        core.output_processor.add_request(request, None, None, 0)
    core.engine_core.add_request(request)


@pytest.mark.parametrize("taken_back", [False, True])
@pytest.mark.parametrize("asked", ASKS)
def test_streamed_input_is_one_text_whose_bank_knows_all_turns(asked, taken_back, checkpoint):
    """Also where it is taken back within its second turn, and read again from its beginning."""
    oracle, ask = OracleModel(checkpoint(), PACE), ASKS[asked]
    for seed in range(40):
        prompts = [make_prompt(90 * seed + i, length) for i, length in enumerate((70, 45, 38))]
        want, gap = truth(oracle, prompts, ask)
        if gap > GAP:
            break
    else:
        raise AssertionError("no session without a near tie")
    with engine(checkpoint(), PACE, enable_prefix_caching=True) as running:
        preempt, preempted = running.core.scheduler._preempt_request, []
        running.core.scheduler._preempt_request = lambda request, *args, **more: (
            preempted.append(request.num_computed_tokens),
            preempt(request, *args, **more),
        )
        for name in ("cold", "warm"):
            got = []
            for i, prompt in enumerate(prompts):
                add_turn(running, name, prompt, ask, first=i == 0)
                tokens = []
                for step in range(200):
                    if taken_back and (i, step) == (1, 5):
                        running.core.scheduler.reset_prefix_cache(reset_running_requests=True)
                    outputs = running.core.step_fn()[0] or {}
                    for group in outputs.values():
                        for output in group.outputs:
                            tokens += output.new_token_ids
                    if len(tokens) >= MAX_TOKENS:
                        break
                got.append(tokens)
            assert got == want, name
            running.llm.llm_engine.abort_request([name], internal=True)
        # Within the second turn, of 70 + 19 and 45 tokens.
        assert len(preempted) == 2 * taken_back
        assert all(tokens >= 70 + 19 + 45 for tokens in preempted)
        # Who says the same text under the engine's settings finds nothing of another's.
        text = [*prompts[0], *want[0][:-1], *prompts[1], *want[1][:-1], *prompts[2], 7]
        cold, _ = oracle.generate(text, 8)
        if min(bank.closest_call for bank in oracle.banks.values()) > GAP:
            assert running.tokens([text], 8) == [cold]
        assert running.all_blocks_are_back()


@pytest.mark.skipif(NATIVE, reason="vLLM's own CPU platform turns asynchronous scheduling off")
def test_sessions_beside_asynchronous_scheduling_are_refused(checkpoint, monkeypatch):
    """L3: a bank has read the token that vLLM takes back at the end of a turn."""
    monkeypatch.setenv("PACELLM_CPU_ASYNC_SCHEDULING", "1")
    with engine(checkpoint(), PACE, async_scheduling=True) as running:
        assert running.core.vllm_config.scheduler_config.async_scheduling
        with pytest.raises(
            VLLMValidationError, match=r"^pacellm: .*--no-async-scheduling \(request 'a"
        ):
            add_turn(running, "a", make_prompt(1, 40), None, first=True)
        assert len(running.tokens([make_prompt(1, 40)])[0]) == 32


# As a server: turns come one after another from a generator of the client's.
SERVER = """
import asyncio, json, sys
import forked
forked.fork()
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

def params(extra):
    return SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False,
                          extra_args=extra, output_kind=RequestOutputKind.DELTA)

async def main(model, settings, prompts, cases):
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **settings))

    async def ask(name, extras):
        said, answered = [], asyncio.Event()

        async def turns():
            for prompt, extra in zip(prompts, extras):
                # vLLM's front end lengthens the list that it is given.
                yield StreamingInput({"prompt_token_ids": [*prompt]}, params(extra))
                await answered.wait()
                answered.clear()

        try:
            async for output in llm.generate(turns(), params(extras[0]), name):
                said += output.outputs[0].token_ids
                if len(said) % 9 == 0:
                    answered.set()
        except Exception as error:
            said.append(str(error))
        return said

    found = [await ask(f"r{i}", extras) for i, extras in enumerate(cases)]
    print(json.dumps([found, llm.output_processor.get_num_unfinished_requests()]))
    llm.shutdown()

asyncio.run(main(*map(json.loads, sys.argv[1:])))
"""


def test_a_turn_that_changes_settings_ends_its_request_alone(checkpoint):
    settings = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "async_scheduling": False,
        "hf_overrides": {"architectures": ["PaceQwen2ForCausalLM"]},
        "additional_config": {"pacellm": PACE},
    }
    prompts = [make_prompt(seed, 60) for seed in range(2)]
    own = {"pacellm_alpha": 1.0}
    cases = [[None, None], [None, own], [own, own], [{"pacellm_report": True}], [own, own]]
    given = map(json.dumps, (str(checkpoint()), settings, prompts, cases))
    lines = printed_by("-c", SERVER, *given, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    found, unfinished = json.loads(lines[-1])
    same, changed, own_ones, reported, again = found
    assert unfinished == 0
    assert len(same) == len(own_ones) == 2 * 9
    assert again == own_ones
    assert own_ones != same
    assert changed[:9] == same[:9]
    assert changed[9].startswith("pacellm: a later turn of streamed input cannot change")
    assert reported[0].startswith("pacellm: a report is about one answer")
