"""Sessions' pages: what is kept, shared, replaced and given up; and which of them are found."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_truth import Truth
from tokenizers import AddedToken
from transformers import AutoTokenizer
from vllm.config import VllmConfig

from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.sessions.admission import check_sessions, session_key
from pacellm_vllm.sessions.finder import Finder
from pacellm_vllm.sessions.reading import SessionReader
from pacellm_vllm.sessions.store import PAGE_TOKENS, SessionStore, passage

KEY, OTHER = b"one", b"two"


def store(pages=1000):
    return SessionStore(pages, lambda tokens: " ".join(f"w{token}" for token in tokens))


def texts(kept, key=KEY):
    session = kept.get(key)
    return [] if session is None else [page.tokens.tolist() for page in session.pages.values()]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 300])
def test_a_text_is_cut_into_pages_of_128(length):
    kept = store()
    kept.add(KEY, list(range(length)), [])
    assert texts(kept) == [[*range(i, min(i + 128, length))] for i in range(0, length, 128)]
    assert kept.as_dict() == {
        "sessions": 1,
        "pages": -(-length // 128),
        "tokens": length,
        "evicted": 0,
    }


def test_an_answer_goes_on_where_its_prompt_ends():
    kept = store()
    kept.add(KEY, [*range(100)], [*range(100, 150)])
    assert texts(kept) == [[*range(128)], [*range(128, 150)]]


def test_a_conversation_sent_again_is_kept_once():
    kept = store()
    kept.add(KEY, [*range(150)], [*range(150, 170)])
    kept.add(KEY, [*range(200)], [7])
    assert texts(kept) == [[*range(128)], [*range(128, 200), 7]]
    # Another one that leaves the first within its second page.
    kept.add(KEY, [*range(180), 9], [])
    assert texts(kept)[2:] == [[*range(128, 180), 9]]
    assert kept.counts().tokens == 128 + 73 + 53


def test_the_longest_unused_pages_go():
    kept = store(pages=4)
    kept.add(KEY, [*range(256)], [])
    kept.add(OTHER, [*range(1000, 1256)], [])
    kept.touch(kept.get(KEY).pages[0])
    kept.add(KEY, [*range(2000, 2200)], [])
    assert texts(kept) == [[*range(128)], [*range(2000, 2128)], [*range(2128, 2200)]]
    assert texts(kept, OTHER) == [[*range(1128, 1256)]]
    assert kept.counts().evicted == 2
    assert len(kept.get(KEY).finder) == 3
    # What went is found nowhere, and comes back where it stood.
    assert not kept.get(KEY).finder.find("w130")
    kept.add(KEY, [*range(256)], [])
    assert len(kept.get(KEY).root.children) == 2
    assert texts(kept)[-1] == [*range(128, 256)]


def test_a_text_longer_than_the_store_leaves_its_end():
    kept = store(pages=2)
    kept.add(KEY, [*range(700)], [])
    assert texts(kept) == [[*range(512, 640)], [*range(640, 700)]]
    assert kept.as_dict() == {"sessions": 1, "pages": 2, "tokens": 188, "evicted": 4}


def test_a_session_whose_last_page_went_is_gone():
    kept = store(pages=1)
    kept.add(KEY, [1, 2], [])
    kept.add(OTHER, [1, 2], [])
    assert kept.get(KEY) is None
    assert kept.counts().sessions == 1
    kept.add(KEY, [1, 2], [])
    assert texts(kept) == [[1, 2]]


def test_a_passage_has_what_is_kept_around_it():
    kept = store()
    kept.add(KEY, [*range(400)], [])
    pages = list(kept.get(KEY).pages.values())
    assert passage(pages[1:2], 16) == [*range(112, 272)]
    assert passage(pages[:2], 16) == [*range(272)]
    assert passage(pages[3:], 16) == [*range(368, 400)]


@pytest.mark.parametrize(
    "pair",
    [
        (("a", None), ("b", None)),
        (("a", "s"), ("a", "t")),
        (("a", None), ("a", "")),
        (("ab", "c"), ("a", "bc")),
        (("a", "salt"), ("asalt", None)),
    ],
)
def test_another_name_or_salt_is_another_session(pair):
    assert session_key(*pair[0]) != session_key(*pair[1])
    assert session_key(*pair[0]) == session_key(*pair[0])


def test_pages_are_found_by_their_words_whatever_came_and_went():
    finder = Finder()
    rng = random.Random(3)
    pages = {
        n: " ".join(f"w{rng.randrange(40)}" for _ in range(rng.randrange(1, 60))) for n in range(30)
    }
    finder.add(pages)
    for gone in (0, 7, 29):
        finder.remove(gone)
        del pages[gone]
    finder.add({30: "Unlike, w3 the OTHERS"})
    pages[30] = "unlike w3 the others"
    truth = Truth(Words())
    truth.pages = [text.split() for text in pages.values()]
    for query in ("w3 w4 w5", "the others", "w1", "w9 w9 nothing"):
        scores, _ = truth.bm25(query)
        found = finder.find(query)
        named = dict(zip(pages, scores, strict=True))
        best_first = sorted((n for n in named if named[n]), key=lambda n: -named[n])
        assert [match.page for match in found] == best_first
        np.testing.assert_allclose(
            [match.score for match in found], [named[n] for n in best_first], rtol=1e-5
        )
    assert finder.find("nowhere ?") == []
    assert Finder().find("w3") == []


@pytest.mark.parametrize("balancer", ["data_parallel_external_lb", "data_parallel_hybrid_lb"])
def test_servers_behind_a_balancer_keep_no_sessions(balancer):
    config = VllmConfig()
    served = SimpleNamespace(
        parallel_config=config.parallel_config,
        model_config=SimpleNamespace(skip_tokenizer_init=False),
    )
    check_sessions(served)
    config.parallel_config.data_parallel_size = 2
    check_sessions(served)
    setattr(config.parallel_config, balancer, True)
    with pytest.raises(PaceConfigError, match="a load balancer in front of several servers"):
        check_sessions(served)


def test_a_look_up_leaves_nothing_behind_but_the_words_of_the_pages():
    finder = Finder()
    finder.add({0: "a page of a few words"})
    assert [match.page for match in finder.find("few words")] == [0]
    assert len(pickle.dumps(finder)) < 10_000


class Words:
    """A tokenizer whose tokens are words."""

    backend_tokenizer = SimpleNamespace(to_str=lambda: '{"added_tokens": []}')

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(tokens)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("scripts/tiny")


PLACES = ["oslo", "lima", "rome", "paris", "cairo", "delhi", "quito", "tokyo", "dakar", "sofia"]
# Special to the tokenizer, to those who made the model, and to its chat template alone.
MARKERS = ["<s>", "<|turn|>", "</think>"]
TURN = st.tuples(
    st.sampled_from(["ask", "ask", "tell", "chat"]),
    st.sampled_from([KEY, OTHER]),
    st.integers(0, 10**6),
    st.sampled_from(["auto", "always", "never"]),
)


def marking_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained("scripts/tiny")
    tokenizer.add_tokens(
        [
            AddedToken("<|turn|>", special=True),
            AddedToken("</think>"),
            AddedToken("<td>"),
            AddedToken("  "),
        ]
    )
    tokenizer.chat_template = "<|turn|>{{ messages }}</think>"
    return tokenizer


def test_no_marker_is_read_again_and_other_added_tokens_are():
    tokenizer = marking_tokenizer()
    marks = tokenizer.convert_tokens_to_ids(["<|turn|>", "</think>"])
    text = tokenizer.convert_tokens_to_ids(["  ", "<td>"])
    assert not {*marks} & {*tokenizer.all_special_ids}
    kept = SessionStore(10**6, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    told = tokenizer.encode("The magic number of oslo is 42.")
    kept.add(KEY, [*told, marks[0], *text, marks[1], *told], [])
    read = SessionReader(kept, tokenizer).read(
        KEY, tokenizer.encode("What is the magic number of oslo?"), 10**9, "always"
    )
    gap = tokenizer.encode("\n\n", add_special_tokens=False)
    assert list(read.tokens) == [*told, *text, *told, *gap]


def test_a_short_page_that_a_prompt_has_is_not_read_again():
    tokenizer = AutoTokenizer.from_pretrained("scripts/tiny")
    kept = SessionStore(10**6, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    told = tokenizer.encode("lima is 42.")
    assert len(told) < 8
    kept.add(KEY, told, [])
    reader = SessionReader(kept, tokenizer)
    asked = tokenizer.encode(" So what about lima and its number?")
    assert reader.read(KEY, asked, 10**9, "always").pages == 1
    assert reader.read(KEY, [*told, *asked], 10**9, "always").pages == 0


def test_pages_that_were_read_stay_longer():
    tokenizer = AutoTokenizer.from_pretrained("scripts/tiny")
    kept = SessionStore(2, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    told = [tokenizer.encode(f"The magic number of {place} is 42.") for place in PLACES[:3]]
    kept.add(KEY, told[0], [])
    kept.add(OTHER, told[1], [])
    asked = tokenizer.encode("What about oslo and its number?")
    assert SessionReader(kept, tokenizer).read(KEY, asked, 10**9, "always").pages == 1
    kept.add(OTHER, told[2], [])
    assert texts(kept) == [told[0]]
    assert texts(kept, OTHER) == [told[2]]


def prompt_of(kind, seed, tokenizer, said):
    """Token ids: of a text that tells something, of a question, or of all that was said and it."""
    rng = random.Random(seed)
    place = rng.choice(PLACES)
    head = "<s>system: be brief\n" if kind == "chat" else ""
    if kind == "tell":
        words = [f"The magic number of {rng.choice(PLACES)} is {rng.randrange(100)}."]
        words += [f"x{rng.randrange(30)}" for _ in range(rng.randrange(300))]
        words += rng.choices([*MARKERS, "said"], k=rng.randrange(9))
        rng.shuffle(words)
        return tokenizer.encode(" ".join(words))
    asked = tokenizer.encode(f"{head}user: what is the magic number of {place}?\nanswer:")
    return [*said[-600:], *asked] if kind == "chat" else asked


@settings(max_examples=40, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=14))
def test_sessions_in_any_order_read_what_each_of_them_wrote(turns):
    tokenizer = marking_tokenizer()
    kept = SessionStore(10**6, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    reader = SessionReader(kept, tokenizer)
    truths = {key: Truth(tokenizer) for key in (KEY, OTHER)}
    said = {KEY: [], OTHER: []}
    for kind, key, seed, how in turns:
        prompt = prompt_of(kind, seed, tokenizer, said[key])
        room = 10**9 if seed % 3 else seed % 400
        read = reader.read(key, prompt, room, how)
        assert len(read.tokens) <= room
        got = [*prompt[: read.place], *read.tokens, *prompt[read.place :]]
        assert got == truths[key].read(prompt, how, room)
        answer = tokenizer.encode(f" {seed % 97}")
        kept.add(key, prompt, answer)
        truths[key].write(prompt, answer)
        said[key] = [*prompt, *answer]
    for key, truth in truths.items():
        assert sorted(texts(kept, key)) == sorted(
            page[(len(page) - 1) // PAGE_TOKENS * PAGE_TOKENS :] for page in truth.pages
        )
