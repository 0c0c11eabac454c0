"""Sessions of streamed input: turns of one request, whose bank goes on from turn to turn."""

import pytest
from checkpoints import make_prompt
from engines import NATIVE, engine
from oracle import OracleModel
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
