"""The experiment of research/recall: its memory against plain lines, its items and its tables."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from recall_bench import following, places
from recall_choose import loss_change, rank_of_gold
from recall_items import Item, bm25, coverage, needles, questions, subspan_match
from recall_memory import (
    Compressor,
    Reader,
    Recall,
    Row,
    random_projection,
    relevance,
    similarities,
)
from recall_report import add_lexical, comparisons, finding, gated, table
from recall_store import Store
from transformers import Qwen2Config, Qwen2ForCausalLM


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def item(head, passages, margin=0):
    return Item("x", head, passages, [], [], slice(0), "", [], {0}, margin)


def test_a_passage_is_relevant_by_its_best_token_for_each_of_the_query():
    torch.manual_seed(0)
    query, keys = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(10, 8), dim=1)
    where = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 3])
    best = similarities(query, keys, where, 4)
    for passage in (0, 1, 3):
        for token in range(3):
            mine = [float(query[token] @ keys[j]) for j in range(10) if where[j] == passage]
            assert best[passage, token] == pytest.approx(max(mine))
    # A passage of which nothing is stored is nobody's first choice.
    assert torch.equal(best[2], best[[0, 1, 3]].amin(0))
    above = [[float(best[p, t] - best[:, t].mean()) for t in range(3)] for p in range(4)]
    assert relevance(best, False).tolist() == pytest.approx([sum(row) for row in above])
    spread = [float(best[:, t].std()) for t in range(3)]
    weighted = [sum(a * s for a, s in zip(row, spread, strict=True)) for row in above]
    assert relevance(best, True).tolist() == pytest.approx(weighted)


def test_what_followed_similar_states_is_mixed_in():
    torch.manual_seed(1)
    states, follow = torch.randn(40, 12), torch.randint(0, 9, (40,))
    compress = Compressor(states.mean(0), random_projection(12, 6))
    recall = Recall(compress, compress(states), follow, 0.05, 0.4, 0.6)
    query, alone = torch.randn(2, 12), torch.randn(2, 9).log_softmax(1)
    mixed = recall.mix(query, alone).exp()
    for i in range(2):
        narrow = (query[i] - states.mean(0)) @ random_projection(12, 6)
        cosines = []
        for state in states:
            other = (state - states.mean(0)) @ random_projection(12, 6)
            cosines.append(float(narrow @ other / narrow.norm() / other.norm()))
        nearest = sorted(range(40), key=lambda j: -cosines[j])[:16]
        shares = [math.exp(cosines[j] / 0.05) for j in nearest]
        weight = 0.6 / (1 + math.exp(-(cosines[nearest[0]] - 0.4) / 0.05))
        expected = [float(p) * (1 - weight) for p in alone[i].exp()]
        for j, share in zip(nearest, shares, strict=True):
            expected[int(follow[j])] += weight * share / sum(shares)
        assert mixed[i].tolist() == pytest.approx(expected, rel=1e-4)
    assert mixed.sum(1).tolist() == pytest.approx([1, 1])


def test_a_stored_state_recalls_the_token_that_followed_it():
    torch.manual_seed(2)
    states = torch.randn(30, 16)
    compress = Compressor(torch.zeros(16))
    recall = Recall(compress, compress(states), torch.arange(30), 0.01, 0.5, 0.9)
    tokens, shares, best = recall.look_up(states)
    assert torch.equal(tokens[:, 0], torch.arange(30))
    assert (shares[:, 0] > 0.99).all()
    assert best.tolist() == pytest.approx([1] * 30)


@pytest.mark.parametrize("head", [[], [90, 91]])
def test_a_key_stands_beside_its_passage_and_the_next_token(head):
    # Without a head the first token is the sink, which is not stored.
    it = item(head, [[1, 2], [3, 4, 5]])
    assert following(it).tolist() == ([2, 3, 4, 5] if head else [3, 4, 5])
    assert places(it).tolist() == ([0, 0, 1, 1] if head else [0, 1, 1])


@pytest.mark.parametrize("kind", ["level", "margin"])
def test_a_store_finds_the_passage_and_recalls_from_it_alone(kind):
    torch.manual_seed(5)
    it = item([90], [[11, 12, 13, 14], [21, 22, 23], [31, 32, 33, 34]])
    states = torch.randn(10, 24)
    compress = Compressor(torch.zeros(24))
    knobs = {
        "find": {"spread": False},
        "gate": {"score": kind, "threshold": 0.5},
        "focus": {"temperature": 0.01, "threshold": 0.5, "weight": 0.9},
    }
    memory = SimpleNamespace(knobs=knobs, compress={"find": compress, "focus": compress})
    keys = {"find": compress(states), "focus": compress(states)}
    store = Store(memory, it, keys)
    found, sure = store.find(states[[4, 5]])
    assert found[0] == 1
    assert store.opens(sure)
    best = similarities(compress(states[[4, 5]]), keys["find"], places(it), 3)
    assert sure == pytest.approx(1 if kind == "level" else float((best[1] - best.mean(0)).mean()))
    assert not store.opens(store.find(torch.randn(40, 24))[1])
    tokens, shares, _ = store.recall("focus", [1]).look_up(states[[4]])
    assert tokens[0, 0] == 22
    assert shares[0, 0] > 0.99
    assert set(tokens[0].tolist()) == {22, 23, 31}


def test_what_is_read_again_is_in_the_order_of_the_text():
    it = item([], [[1, 2, 3], [4, 5, 6], [7, 8, 9]], margin=1)
    assert it.part([2, 0]) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert it.part([1]) == [3, 4, 5, 6, 7]
    it.margin = 0
    assert it.part([2, 0]) == [1, 2, 3, 7, 8, 9]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(config).save_pretrained(path)
    reader = Reader(str(path), [(1, "ffn"), (0, "in")])
    # In bfloat16 two tokens can be equally likely.
    reader.model.float()
    return reader


@torch.no_grad()
def test_states_are_those_of_the_chosen_layers(reader):
    ids = [5, 6, 7, 8]
    reading = reader.read(ids, last=2)
    whole = reader.model(torch.tensor([ids]), output_hidden_states=True)
    assert torch.allclose(reading.logprobs, whole.logits[0, -2:].log_softmax(-1), atol=1e-5)
    # What the second layer's FFN adds is its activation through the last projection.
    inputs, mlps = [], [layer.mlp for layer in reader.model.model.layers]
    handle = mlps[1].register_forward_hook(lambda module, a, output: inputs.append((a[0], output)))
    again = reader.read(ids)
    handle.remove()
    [(given, added)] = inputs
    assert torch.allclose(mlps[1].down_proj(again.states[1, "ffn"].clone()), added[0], atol=1e-5)
    assert not torch.allclose(again.states[0, "in"], given[0])


def test_answers_of_many_prompts_at_once_are_those_of_each_alone(reader):
    torch.manual_seed(4)
    compress = Compressor(torch.zeros(48), random_projection(48, 8))
    states = reader.read(list(range(1, 40))).states[1, "ffn"]
    recall = Recall(compress, compress(states), torch.arange(2, 41), 0.05, 0.1, 0.9)
    prompts = [[3, 4], [9, 8, 7, 6, 5], [3, 4], [20] * 7]
    memories = [None, recall, recall, None]
    rows, expected = [], []
    for prompt, memory in zip(prompts, memories, strict=True):
        reading = reader.read(prompt)
        first = reading.logprobs
        if memory is not None:
            first = memory.mix(reading.states[1, "ffn"][-1:], first)
        rows.append(Row(reading.cache, first[0], memory))
        said = []
        for _ in range(6):
            again = reader.read(prompt + said)
            logprobs = again.logprobs
            if memory is not None:
                logprobs = memory.mix(again.states[1, "ffn"][-1:], logprobs)
            said.append(int(logprobs.argmax()))
        expected.append(said)
    reader.write(rows, (1, "ffn"), 6, stop=set())
    assert [row.tokens for row in rows] == expected
    assert expected[0] != expected[2]

    stopped = [Row(row.cache, row.logprobs, row.recall) for row in rows]
    reader.write(stopped, (1, "ffn"), 6, stop={expected[1][2]})
    for row, said in zip(stopped, expected, strict=True):
        end = said.index(expected[1][2]) + 1 if expected[1][2] in said else 6
        assert row.tokens == said[:end]


def test_development_and_held_out_questions_share_nothing(tmp_path):
    with gzip.open(tmp_path / "nq-open-oracle.jsonl.gz", "wt") as file:
        for n in range(600):
            passage = {"title": f"t{n}", "text": f"text {n % 590}"}
            row = {"question": f"q{n}", "answers": [f"{n % 590}"], "ctxs": [passage]}
            file.write(json.dumps(row) + "\n")
    seen = []
    for held_out in (False, True):
        items = questions(Letters(), tmp_path, held_out, 100, 5)
        for it in items:
            [gold] = it.gold
            assert it.words[gold].endswith(f"text {it.answers[0]}")
            assert Letters().decode(it.question[it.span]) == f" {it.asked}"
            assert f"text {it.answers[0]}\n" in Letters().decode(it.part(it.gold))
        seen.append({words.split()[-1] for it in items for words in it.words})
    assert not seen[0] & seen[1]


def test_a_needle_is_where_its_item_says(tmp_path):
    with gzip.open(tmp_path / "leval-natural_question.jsonl.gz", "wt") as file:
        for n in range(8):
            file.write(json.dumps({"input": f"<P> essay {n} " + "so on and on " * 400}) + "\n")
    for it in needles(Letters(), tmp_path, True, 20, 1500):
        text = Letters().decode(it.part(it.gold))
        asked = Letters().decode(it.question).split("Answer: ")[1]
        assert f"{asked} {it.answers[0]}.\n" in Letters().decode(it.context)
        assert f" {it.answers[0]}" in text
        assert "<P>" not in Letters().decode(it.context)


def test_bm25_by_hand():
    scores = bm25("The cat?", ["a cat sat", "the dog", "a dog ran far away"])
    rarity = math.log(1 + 2.5 / 1.5)
    mean = 10 / 3
    cat = rarity * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / mean))
    the = rarity * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 2 / mean))
    assert scores == pytest.approx([cat, the, 0])


def test_an_answer_counts_anywhere_in_what_was_said():
    assert subspan_match("It was the Eiffel-Tower.", ["x", "Eiffeltower"]) == 1
    assert subspan_match("Paris", ["London"]) == 0


def test_the_rank_of_gold_counts_ties_against_it():
    assert rank_of_gold([1, 3, 3, 0], {1}) == 1
    assert rank_of_gold([1, 3, 3, 0], {1, 2}) == 0


def test_a_mixture_s_price_is_worked_out_from_what_was_kept():
    row = {"alone": [0.5, 0.1], "say": {"s": {"token": {"best": [0.4, 0.9], "0.02": [0, 1]}}}}
    share = [0.5 / (1 + math.exp(-(best - 0.4) / 0.05)) for best in (0.4, 0.9)]
    after = [(1 - share[0]) * 0.5, (1 - share[1]) * 0.1 + share[1]]
    total = math.log(0.5 / after[0]) + math.log(0.1 / after[1])
    found = loss_change([row, row], "s", "token", "alone", 0.02, 0.4, 0.5)
    assert found == pytest.approx((total, total / 2))


def test_the_table_compares_the_same_items():
    rows = [
        {"match": {"off": float(n % 2), "on": 1.0}, "loss": {"off": 3.0, "on": 3.0 - n % 3}}
        for n in range(60)
    ]
    lines = table(rows, "off").splitlines()
    assert lines[2].startswith("| off | 0.500 |  | 3.000 |  |")
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells[:2] == ["on", "1.000"]
    assert cells[3] == "2.000"
    assert cells[2].startswith("+0.500 [+0.3")
    assert cells[4].startswith("-1.000 [-1.2")


def test_a_shut_gate_is_the_question_alone():
    arms = {"recall in found 1": 2.0, "alone": 7.0}
    arms |= {"read again found 1": 3.0, "read again found 2": 1.0}
    for opens in (True, False):
        row = gated({"opens": opens, "match": dict(arms), "loss": dict(arms)})
        for kind in ("match", "loss"):
            assert row[kind]["recall in found 1, gated"] == (2 if opens else 7)
            assert row[kind]["read again found 2, gated"] == (1 if opens else 7)


def test_arms_are_compared_item_by_item():
    arms = [f"read again {name} {n}" for name in ("found", "BM25") for n in (1, 2)]
    arms += ["last tokens as many", "whole context", "read again gold"]
    arms += ["recall in found 1", "recall any token"]
    row = {"match": dict.fromkeys(arms, 0.5), "loss": dict.fromkeys(arms, 2.0)}
    row["match"]["read again found 1"] = 0.75
    row["loss"]["read again BM25 1"] = 2.5
    lines = comparisons([row] * 3).splitlines()
    assert lines[2] == (
        "| read again found 1 - read again BM25 1 "
        "| +0.250 [+0.250, +0.250] | -0.500 [-0.500, -0.500] |"
    )


def test_a_passage_is_found_where_gold_is_among_the_first():
    rows = [
        {"gold": [3], "found": [3, 1, 2], "bm25": [1, 3, 2], "narrow": {"8": [1, 2, 3]}},
        {"gold": [4, 5], "found": [5, 1, 2], "bm25": [1, 2, 5], "narrow": {"8": [4, 1, 2]}},
    ]
    lines = finding(rows).splitlines()
    assert lines[2] == "| found | 1.000 | 1.000 | 1.000 |"
    assert lines[3] == "| BM25 | 0.000 | 0.500 | 1.000 |"
    assert lines[4] == "| found with keys of 8 | 0.500 | 0.500 | 1.000 |"
    assert lines[5].startswith(
        "| found - BM25 | +1.000 [+1.000, +1.000] | +0.500 [+0.000, +1.000] |"
    )


def test_coverage_is_a_share_of_the_query_s_words():
    texts = ["a cat sat", "the dog", "a dog ran far away"]
    rarity = math.log(1 + 2.5 / 1.5), math.log(1 + 3.5 / 0.5)
    [cat, *_] = bm25("cat", texts)
    assert coverage("cat mat", texts) == pytest.approx(cat / (sum(rarity) * 2.5))
    assert coverage("mat", texts) == coverage("", texts) == 0
    assert 0.9 < coverage("cat", ["cat " * 50, "x", "y"]) < 1


def test_a_question_that_bm25_s_gate_left_alone_is_as_without(tmp_path):
    lines = [
        {"settings": {}},
        {
            "config": "lexical",
            "id": "held-1",
            "match": {"read again BM25 2": 0.0},
            "loss": {"read again BM25 2": 3.0},
        },
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "unneeded-lexical.jsonl").write_text(text)
    rows = [{"id": f"held-{n}", "match": {"off": 1.0}, "loss": {"off": 2.0}} for n in range(2)]
    add_lexical(rows, tmp_path)
    assert [row["match"]["read again BM25 2, gated"] for row in rows] == [1, 0]
    assert [row["loss"]["read again BM25 2, gated"] for row in rows] == [2, 3]
