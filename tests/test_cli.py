"""``pacellm serve`` builds the right vllm command or says what is wrong; configs/ are valid."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.cli import main as vllm_cli
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pacellm_vllm import cli
from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.flags import add_settings, given_settings
from pacellm_vllm.models.table import ARCHITECTURES
from pacellm_vllm.serving import command

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def vllm_args(arguments):
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(arguments)


def parsed(model, settings, rest=()):
    _, *arguments = command.serve_arguments(str(model), settings, list(rest))
    return vllm_args(arguments)


def test_the_command_names_the_architecture_and_the_settings(checkpoint):
    args = parsed(checkpoint("llama"), {"layers": [1, 3], "alpha": 0.5}, ["--port", "8123"])
    assert args.hf_overrides == {"architectures": ["PaceLlamaForCausalLM"]}
    assert args.additional_config == {"pacellm": {"layers": [1, 3], "alpha": 0.5}}
    assert args.port == 8123


def test_what_the_user_gives_to_vllm_is_kept(checkpoint):
    args = parsed(
        checkpoint(),
        {"layers": [1]},
        [
            "--hf-overrides",
            '{"rope_theta": 5000}',
            '--additional-config={"other": 1, "pacellm": {"preset": "paper"}}',
        ],
    )
    assert args.hf_overrides == {
        "rope_theta": 5000,
        "architectures": ["PaceQwen2ForCausalLM"],
    }
    assert args.additional_config == {"other": 1, "pacellm": {"preset": "paper", "layers": [1]}}


@pytest.mark.parametrize(
    ("settings", "rest", "sentence"),
    [
        ({"layers": [99]}, [], "layers = 99 is not allowed; it must be from 0 to 3"),
        ({"bank_size": 0}, [], "bank_size = 0 is not allowed"),
        ({"clip": "yes"}, [], "clip = 'yes' is not allowed; it must be true or false"),
        ({"alpha": "much"}, [], "alpha = 'much' is not allowed; it must be a number from 0 to 1"),
        (
            {"layers": [1]},
            ["--additional-config", '{"pacellm": {"layers": [2]}}'],
            "layers is given both as a flag and in --additional-config",
        ),
        ({}, ["--additional-config.pacellm.noise", "0"], "as one JSON object"),
        ({}, ["--hf-overrides", "{oops"], "as one JSON object"),
        ({}, ["--additional-config", '{"pacellm": [1]}'], "it must be an object such as"),
        ({}, ["--config", "nowhere.yaml"], "'nowhere.yaml' is not a file"),
        ({}, ["--config", str(CONFIGS[0])], "which the memory's flags would replace"),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(settings, rest, sentence, checkpoint):
    with pytest.raises(PaceConfigError) as refusal:
        command.serve_arguments(str(checkpoint()), settings, rest)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_would_replace_the_flags_by_parts_is_refused(checkpoint, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 8000\nadditional_config.pacellm.alpha: 0.1\n")
    with pytest.raises(PaceConfigError, match="which the memory's flags would replace"):
        command.serve_arguments(str(checkpoint()), {"layers": [1]}, ["--config", str(file)])


@pytest.mark.parametrize("text", ["a: [", "8000", "- port", "caf\xe9: \xff"])
def test_a_file_of_flags_that_is_none_is_refused(text, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PaceConfigError, match="is not YAML with a flag on each line"):
        command.serve_arguments("model", {}, ["--config", str(file)])


@pytest.mark.parametrize("named", ["", "other", "pacellm_cpu,pacellm_http"])
def test_plugins_that_leave_memory_out_are_refused(named, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", named)
    monkeypatch.setattr(vllm_cli, "main", lambda: pytest.fail("vLLM was started"))
    assert cli.main(["serve", str(checkpoint())]) == 2
    assert "keeps vLLM from loading this package; unset it" in capsys.readouterr().err
    command.check_plugins("other,pacellm")


def test_a_model_without_memory_is_refused(tmp_path, capsys):
    config = {"model_type": "zamba2", "architectures": ["Zamba2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["serve", str(tmp_path), "--layers", "1"]) == 2
    said = capsys.readouterr().err
    assert "is a Zamba2ForCausalLM, which carries no memory: several of its layers share" in said
    assert said.count("\n") == 1


def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("pacellm: the configuration of ")


@pytest.mark.parametrize("words", [[], ["--port", "8000", "some/model"]])
def test_the_model_comes_before_the_flags(words, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["serve", *words])
    assert refusal.value.code == 2
    assert capsys.readouterr().err.startswith("pacellm: MODEL comes first")


def test_the_revision_to_be_served_is_the_one_read(monkeypatch, checkpoint):
    asked, real = [], command.checkpoint_config

    def checkpoint_config(model, trust_remote_code, revision=None):
        asked.append((trust_remote_code, revision))
        return real(model, trust_remote_code)

    monkeypatch.setattr(command, "checkpoint_config", checkpoint_config)
    args = parsed(checkpoint(), {}, ["--revision=v2", "--trust-remote-code"])
    assert (args.trust_remote_code, args.revision) == (True, "v2")
    assert asked == [(True, "v2")]


def test_serve_prints_the_command_and_runs_it(checkpoint, capsys, monkeypatch):
    ran = []
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(sys, "argv", ["pacellm"])
    monkeypatch.setattr(vllm_cli, "main", lambda: ran.extend(sys.argv))
    cli.main(["serve", str(checkpoint()), "--layers", "1,3", "--theta-low", "0.1", "--port", "8"])
    plugins, *printed = shlex.split(capsys.readouterr().out)
    assert plugins.startswith("VLLM_PLUGINS=")
    assert {"pacellm", "pacellm_cpu", "pacellm_http"} <= set(plugins.partition("=")[2].split(","))
    assert printed == ran
    assert ran[:2] == ["vllm", "serve"]
    settings = vllm_args(printed[2:]).additional_config["pacellm"]
    assert settings == {"layers": [1, 3], "theta_low": 0.1}


def test_every_setting_can_be_given_as_a_flag(checkpoint):
    settings = PaceConfig.from_sources({"preset": "official", "layers": [1, 2]})
    words = [checkpoint()]
    for name, value in settings.model_dump(exclude={"experts"}).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_settings(parser)
    given = given_settings(parser.parse_args(list(map(str, words))))
    assert PaceConfig.from_sources(given) == settings
    assert len(given) == len(PaceConfig.model_fields) - 1


def test_experts_are_not_turned_off_by_a_flag_that_would_be_as_none(capsys):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--experts", "null"])
    assert '--additional-config \'{"pacellm": {"experts": null}}\'' in capsys.readouterr().err


def test_help_does_not_wait_for_vllm():
    script = "import sys, pacellm_vllm.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "pydantic" in done.stdout.split()
    assert {"vllm", "torch", "sklearn", "transformers"}.isdisjoint(done.stdout.split())


def test_no_flag_of_ours_hides_one_of_vllms():
    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    for name in PaceConfig.model_fields:
        assert f"--{name.replace('_', '-')}" not in known


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations_are_what_vllm_reads(path):
    parser = FlexibleArgumentParser()
    arguments = parser._pull_args_from_config(["serve", "--config", str(path)])
    args = vllm_args(arguments[1:])
    [architecture] = args.hf_overrides["architectures"]
    assert architecture in ARCHITECTURES
    layers = {"tiny": 4, "qwen2.5-7b-instruct": 28, "qwen3-8b": 36}.get(path.stem, 32)
    config = PaceConfig.from_sources(args.additional_config["pacellm"])
    auto = PaceConfig.from_sources({}).resolve_layers(layers)
    assert config.resolve_layers(layers) == auto
