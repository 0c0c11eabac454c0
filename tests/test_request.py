"""What a request may set for itself: every shape a client can give it, and the key it hashes to."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.backend import rows_of
from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.request import RequestSettings, journal_key, key_of, settings_of, with_journal_key
from pacellm_vllm.sentences import shown

RULES = PaceConfig.from_sources({"preset": "official"}).rules()
OFF = RequestSettings(enabled=False)
MOST = 400  # characters of a sentence, whatever it is about


def refusal(extra_args):
    with pytest.raises(PaceConfigError) as raised:
        RequestSettings.of(extra_args)
    sentence = str(raised.value)
    assert sentence.startswith("pacellm: ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < MOST
    return sentence


@pytest.mark.parametrize(
    "key",
    [
        "pacellm-alpha",
        "pacellm.alpha",
        "pacellm alpha",
        "PACELLM_alpha",
        "PaceLLM.Alpha",
        "pacellm_Alpha",
        "pacellm__alpha",
        "pacellmalpha",
        "pacellm/alpha",
        "pace-llm-alpha",
        " pacellm_alpha",
        "pacellm\u200b_alpha",
        "\uff50\uff41\uff43\uff45\uff4c\uff4c\uff4d_alpha",
        b"pacellm_alpha",
    ],
)
def test_a_near_miss_is_refused_with_the_right_spelling(key):
    assert refusal({key: 0.5}).endswith("; write pacellm_alpha.")


@pytest.mark.parametrize("key", ["PACELLM", "PaceLLM", "pace-llm", "pacellm ", "pacellm_"])
def test_so_is_one_of_the_object(key):
    assert refusal({key: {"alpha": 0.5}}).endswith("; write pacellm.")


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"pacellm-gamma": 1}, "cannot set 'pacellm-gamma'; it can set pacellm_enabled, pacellm_a"),
        ({"pacellm_preset": 1}, "cannot set 'pacellm_preset'; it can set pacellm_enabled, "),
        ({"pacellm_\ud800": 1}, "cannot set 'pacellm_\\ud800'; "),
        ({"pacellm": {"Alpha": 1}}, "cannot set 'Alpha'; write alpha."),
        ({"pacellm": {"pacellm_alpha": 1}}, "cannot set 'pacellm_alpha'; write alpha."),
        ({"pacellm": {1: 2}}, "cannot set 1; it can set enabled"),
        ({"pacellm": '{"pi": 1}'}, "cannot set 'pi'; it can set enabled, alpha, noise, theta_"),
        ({"pacellm_alpha": 0.5, "pacellm": {"alpha": 0.5}}, "sets 'alpha' twice"),
        ({"pacellm": '{"alpha": 0.1, "alpha": 0.9}'}, "sets 'alpha' twice"),
        (
            {"vllm_xargs": {"a": 1, "pacellm_alpha": 1}},
            "'pacellm_alpha' stands within 'vllm_xargs'",
        ),
        ({"extra_args": {"pacellm": {}}}, "'pacellm' stands within 'extra_args'"),
        ({"extra_body": {"vllm_xargs": {"pacellm_alpha": 1}}}, "'pacellm_alpha' stands within 'e"),
    ],
)
def test_what_is_not_ours_to_set_is_refused(extra_args, words):
    assert words in refusal(extra_args)


@pytest.mark.parametrize(
    "extra_args",
    [
        None,
        {},
        {1: 2, None: 3, (1, 2): 4, b"\xff": 5, "alpha": 9, "spacellm_alpha": 9, "pace": 1, "": 2},
        {"pacellm": {}},
        {"pacellm": "{}"},
        {"pacellm": None, "pacellm_alpha": None, "pacellm_enabled": None},
        {"pacellm": '{"alpha": null}'},
        {"pacellm": "null"},
        {"pacellm_enabled": True},
        {"vllm_xargs": {"alpha": 1}, "extra_args": 1, "extra_body": {"vllm_xargs": None}, "a": {}},
    ],
)
def test_what_is_none_of_ours_or_null_sets_nothing(extra_args):
    settings = RequestSettings.of(extra_args)
    assert settings == RequestSettings()
    assert settings.overrides() == {}


@pytest.mark.parametrize("extra_args", [[1], "pacellm_alpha", b"x", 7, {"pacellm_alpha"}])
def test_extra_arguments_that_are_no_mapping_are_refused(extra_args):
    assert "extra_args = " in refusal(extra_args)


@pytest.mark.parametrize("value", [0.5, "0.5", "5e-1", " .5 ", "+0.50", "0.5" + "0" * 9999])
def test_a_number_may_be_given_as_text(value):
    for given in ({"pacellm_alpha": value}, {"pacellm": {"alpha": value}}):
        assert RequestSettings.of(given) == RequestSettings(alpha=0.5)
    assert RequestSettings.of({"pacellm": json.dumps({"alpha": value})}).alpha == 0.5


@pytest.mark.parametrize(
    ("value", "switch"),
    [
        *((value, True) for value in (True, 1, "true", "True", "1")),
        *((value, False) for value in (False, 0, "false", "FALSE", "0")),
    ],
)
def test_memory_is_switched_by_booleans_or_what_http_makes_of_them(value, switch):
    assert RequestSettings.of({"pacellm_enabled": value}).enabled is switch


BAD = [True, False, "", "half", "nan", "inf", "-1e400", "0x1", "true", b"0.5", [0.5], {}, (0.5,)]
BAD += [float("nan"), float("inf"), 10**400, -(10**5000), 1.0000001, -1e-9, 0.5 + 0j]


@pytest.mark.parametrize("value", BAD, ids=lambda value: shown(value))
def test_what_is_no_such_number_is_refused(value):
    assert refusal({"pacellm_alpha": value}).startswith("pacellm: alpha = ")
    assert refusal({"pacellm": {"noise": value}}).startswith("pacellm: noise = ")


@pytest.mark.parametrize("value", [2, -1, 1.0, 0.0, "yes", "on", "", "none", b"1", [True], {}])
def test_what_is_no_switch_is_refused(value):
    assert "enabled = " in refusal({"pacellm_enabled": value})
    assert "it must be true or false" in refusal({"pacellm": {"enabled": value}})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "[" * 100_000,
        '{"alpha":' * 100_000,
        '{"alpha": ' + "[" * 500 + "]" * 500 + "}",
        '{"alpha": ' + "1" * 5000 + "}",
        '{"alpha": 1e400}',
        '{"alpha": -Infinity}',
        '{"alpha": NaN}',
        '{"alpha": true}',
        '{"alpha": "\ud800"}',
        "x" * 1_000_000,
        '"' + "x" * 1_000_000 + '"',
        "\ufeff{}",
        "",
        "0.5",
        "\ud800",
        b'{"alpha": 0.5}',
        [["alpha", 0.5]],
        True,
        {"x" * 1_000_000: 1},
        {"alpha": "x" * 1_000_000},
        {"alpha": nested(100_000)},
        {"alpha": list(range(1_000_000))},
    ],
    ids=range(22),
)
def test_a_hostile_object_is_refused_in_a_short_sentence(value):
    refusal({"pacellm": value})


def test_a_hostile_key_is_refused_in_a_short_sentence():
    refusal({"pacellm_" + "x" * 1_000_000: 1})
    # Combining marks out of order, which Unicode normalisation sorts in quadratic time.
    refusal({"pacellm" + "\u0300\u0316" * 500_000: 1})


def test_what_is_shown_is_short_and_never_raises():
    class Loud:
        def __repr__(self):
            raise RuntimeError

    assert shown({"alpha": 0.5}) == "{'alpha': 0.5}"
    assert shown([2, 2]) == "[2, 2]"
    for value in ("x" * 10**6, nested(10**5), 10**5000, Loud(), dict.fromkeys(range(99), "y" * 99)):
        assert len(shown(value)) <= 80


def key(rules=RULES, **asked):
    given = {f"pacellm_{name}": value for name, value in asked.items()}
    return RequestSettings.of(given).key(rules)


def test_there_is_one_key_per_effect():
    assert key() == ""
    # What the engine does anyway.
    assert key(alpha=0.2) == key(alpha="2e-1", noise=0.1) == key(enabled=True) == ""
    assert key(theta_high=0.75, theta_low="0.25") == ""
    one = key(alpha=0.5)
    assert one
    for same in (
        {"alpha": "0.5"},
        {"alpha": "5e-1", "enabled": 1},
        {"alpha": 0.5, "noise": 0.1},
        {"alpha": 0.5, "theta_low": 0.25, "theta_high": 0.75},
    ):
        assert key(**same) == one
    assert key(noise=0) == key(noise=-0.0) == key(noise="-0") != ""
    # No memory, whatever else was asked for.
    off = key(enabled=False)
    assert off == key(enabled=0, alpha=0.9) == key(alpha=0) == key(alpha=-0.0, noise=0.9)
    different = [
        {"alpha": 0.5, "noise": 0.2},
        {"alpha": 0.6},
        {"noise": 0.5},
        {"noise": 0},
        {"theta_high": 0.75, "theta_low": 0.2},
        {"theta_high": 0.8, "theta_low": 0.25},
    ]
    assert len({"", one, off, *(key(**asked) for asked in different)}) == len(different) + 3


def test_the_key_follows_the_engines_rules():
    other = replace(RULES, alpha=0.5)
    assert key(other, alpha=0.5) == ""
    assert key(other, alpha=0.2) != ""
    # Without least similar slots their weight means nothing.
    assert key(replace(RULES, negative_k=0), noise=0.7) == ""
    # An engine whose memory does nothing does so for everyone who asks for no more.
    idle = replace(RULES, alpha=0.0)
    assert key(idle, enabled=False) == key(idle, noise=0.7) == key(idle, alpha=0) == ""
    assert key(idle, alpha=0.2) != ""


def test_a_bad_setting_is_refused_although_memory_is_off():
    assert "alpha = 3 " in refusal({"pacellm_enabled": False, "pacellm_alpha": 3})


def test_alpha_nothing_is_no_memory():
    assert RequestSettings.of({"pacellm_alpha": 0, "pacellm_noise": 0.5}) == OFF


def request_with(extra_args):
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))


def test_a_request_is_read_once(monkeypatch):
    read = []
    of = RequestSettings.of
    monkeypatch.setattr(RequestSettings, "of", lambda given: read.append(given) or of(given))
    request = request_with({"pacellm_alpha": 0.5})
    for _ in range(100):
        assert settings_of(request) == RequestSettings(alpha=0.5)
        assert key_of(request, RULES) == key(alpha=0.5)
    # The last of them is that of ``key`` itself.
    assert len(read) == 1 + 100
    # A next turn of streamed input brings other parameters.
    request.sampling_params = SimpleNamespace(extra_args=None)
    assert settings_of(request) == RequestSettings()
    assert key_of(request, RULES) == ""
    assert settings_of(SimpleNamespace(sampling_params=None)) == RequestSettings()


def test_a_request_inherits_nothing_from_the_one_whose_row_it_takes():
    """Of model runner V2's request table."""
    config = SimpleNamespace(compilation_config=SimpleNamespace())
    batch = BatchSettings(config)
    batch.add_request(5, SamplingParams(extra_args={"pacellm_alpha": 0.9}))
    assert batch.get(5) == RequestSettings(alpha=0.9)
    batch.add_request(5, SamplingParams())
    assert batch.get(5) is None


def test_rows_are_those_of_the_request_table_where_there_is_one():
    common = SimpleNamespace(num_reqs=2, req_idx=np.array([5, 2]))
    assert list(rows_of(common)) == [5, 2]
    assert list(rows_of(SimpleNamespace(num_reqs=2, req_idx=None))) == [0, 1]


def test_nobody_chooses_where_a_report_is_kept():
    forged = {"journal_of_pacellm": "victim\nx"}
    plain = SamplingParams(extra_args=with_journal_key(forged, "mine"))
    assert journal_key(plain) is None
    asking = {**forged, "pacellm_report": True}
    keys = {
        journal_key(SamplingParams(extra_args=with_journal_key(asking, "mine"))) for _ in range(2)
    }
    # Requests with one id have reports of their own.
    assert [key.split("\n")[0] for key in keys] == ["mine"] * 2
