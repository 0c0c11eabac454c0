"""The oracle's model, and that test checkpoints and prompts take every branch of its memory."""

from typing import Any

import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint, make_prompt
from oracle import OracleModel


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, OracleModel]:
    """A model per architecture, without memory unless asked for."""
    return {
        arch: OracleModel(make_checkpoint(tmp_path_factory.mktemp(arch), arch), {})
        for arch in ARCHITECTURES
    }


PACE: dict[str, Any] = {"preset": "official", "layers": [1, 3], "bank_size": 23, "segment_size": 32}


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestModel:
    def test_without_memory_it_is_the_original(self, models, arch):
        prompt = make_prompt(0, 70)
        with torch.no_grad():
            expected = models[arch].model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(models[arch].forward(prompt), expected)
        cut = models[arch].forward(prompt, segment_size=7)
        torch.testing.assert_close(cut, expected, atol=1e-4, rtol=0)

    def test_the_memory_acts_from_the_second_segment_on(self, models, arch):
        prompt = make_prompt(1, 96)
        change = models[arch].forward(prompt, **PACE) - models[arch].forward(prompt)
        assert change[:32].abs().max() < 1e-4
        assert change[32:].abs().mean() > 1e-2

    def test_generated_tokens_pass_like_prompt_tokens(self, models, arch):
        model, prompt = models[arch], make_prompt(2, 50)
        tokens, prompt_logprobs = model.generate(prompt, 40, **PACE)
        banks = model.banks
        assert len(tokens) == 40
        # The last token never entered the model.
        logits = model.forward(prompt + tokens[:-1], **PACE)
        assert tokens == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
        logprobs = logits.log_softmax(dim=-1)[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(prompt_logprobs), logprobs, atol=1e-4, rtol=0)
        for layer, bank in model.banks.items():
            torch.testing.assert_close(banks[layer].keys, bank.keys, atol=1e-4, rtol=0)
            assert banks[layer].usage.tolist() == bank.usage.tolist()
            # 89 tokens are two whole segments; the rest is not committed.
            assert bank.counts["write"].total() == 64

    @pytest.mark.parametrize("preset", ["official", "paper"])
    @pytest.mark.parametrize(("bank_size", "segment_size"), [(7, 16), (23, 32), (100, 64)])
    def test_checkpoints_take_every_branch(self, models, arch, preset, bank_size, segment_size):
        pace = {"layers": [1, 3], "preset": preset}
        pace |= {"bank_size": bank_size, "segment_size": segment_size}
        model = models[arch]
        for seed in range(2):
            model.forward(make_prompt(seed, 600), **pace)
            for bank in model.banks.values():
                assert bank.num_valid == bank_size
                assert min(bank.counts["slots"][k] for k in ("merged", "filled", "replaced")) > 0
                for regimes in (bank.counts["read"], bank.counts["write"]):
                    compared = regimes.total() - regimes["empty"]
                    for category in ("high", "mid", "low"):
                        assert regimes[category] >= 0.02 * compared, (category, regimes)

    def test_greedy_decoding_is_varied_and_the_memory_changes_it(self, models, arch):
        model, prompt = models[arch], make_prompt(0, 300)
        off, _ = model.generate(prompt, 32)
        on, _ = model.generate(prompt, 32, **PACE)
        assert on != off
        for tokens, pace in ((off, {}), (on, PACE)):
            assert len(set(tokens)) >= 12
            best = model.forward(prompt + tokens[:-1], **pace)[len(prompt) - 1 :].topk(2).values
            assert (best[:, 0] - best[:, 1]).median() > 0.1


def test_checkpoints_are_deterministic(tmp_path):
    first, again, other = (
        (make_checkpoint(tmp_path / name, "llama", seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other
    assert make_prompt(3, 50) == make_prompt(3, 50) != make_prompt(4, 50)
