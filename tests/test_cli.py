"""The command line: what each command prints, and the one line a mistake gets."""

import json

import pytest

import siglip2
from siglip2.cli import main
from siglip2.config import QuickstartConfig
from siglip2.data.quickstart import quickstart_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return quickstart_dir(QuickstartConfig(concepts=12, cache_dir=str(cache)))


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory):
    """An untrained model with the data set's tokenizer, as `siglip2 train` leaves one."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = siglip2.get_tokenizer(str(data), text_length=8)
    model = siglip2.create_model(
        "siglip2-tiny-patch8-32", text_length=8, vocab_size=tokenizer.vocab_size
    )
    siglip2.save_pretrained(model, folder, tokenizer=tokenizer)
    return folder


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "zero-shot classification and retrieval" in capsys.readouterr().out


def test_an_unknown_command_lists_those_there_are(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["trian"])
    assert exit_info.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_mistake_is_one_line_without_a_traceback(capsys):
    assert main(["train", "--config", "quikstart"]) == 1
    error = capsys.readouterr().err
    assert "did you mean 'quickstart'" in error
    assert len(error.strip().splitlines()) == 1


def test_missing_data_is_one_line(capsys, tmp_path):
    argv = ["train", "--config", "quickstart", "--data.train", str(tmp_path / "none.csv")]
    assert main([*argv, "--train.output_dir", str(tmp_path / "run")]) == 1
    assert "no data at" in capsys.readouterr().err


def test_data_without_a_tokenizer_says_how_to_pass_one(capsys, tmp_path, data):
    shard = next(data.glob("train-*.tar"))
    argv = ["train", "--config", "quickstart", "--data.train", str(shard)]
    assert main([*argv, "--train.output_dir", str(tmp_path / "run")]) == 1
    assert "data.tokenizer" in capsys.readouterr().err


def test_a_missing_tracker_names_the_extra(capsys, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    argv = ["train", "--config", "quickstart", "--train.report_to", "[trackio]"]
    argv += ["--data.quickstart.concepts", "4", "--data.quickstart.cache_dir", str(tmp_path)]
    assert main([*argv, "--train.output_dir", str(tmp_path / "run")]) == 1
    assert "pip install 'siglip2[log]'" in capsys.readouterr().err


def test_config_show_is_yaml_of_the_preset(capsys):
    assert main(["config", "show", "b16-256"]) == 0
    assert "name: siglip2-base-patch16-256" in capsys.readouterr().out


def test_config_list_says_what_each_preset_is(capsys):
    assert main(["config", "list"]) == 0
    assert "finetune" in capsys.readouterr().out


def test_env_says_which_backend_runs(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert '"torch"' in out
    assert "sigmoid_loss: " in out


def test_inspect_counts_a_users_tars(capsys, data):
    assert main(["data", "inspect", str(next(data.glob("train-*.tar")))]) == 0
    out = capsys.readouterr().out
    assert "24" in out
    assert "en" in out


def test_eval_prints_and_writes_recalls(capsys, data, exported, tmp_path):
    held_out = str(data / "heldout-0000.tar")
    out = tmp_path / "eval.json"
    assert main(["eval", str(exported), held_out, "--max-images", "40", "--out", str(out)]) == 0
    assert "i2t R@1" in capsys.readouterr().out
    assert "val/val/twemoji/mean/i2t_r1" in json.loads(out.read_text())["metrics"]


def test_eval_needs_a_tokenizer(capsys, data, exported, tmp_path):
    siglip2.save_pretrained(siglip2.from_pretrained(exported), tmp_path / "bare")
    assert main(["eval", str(tmp_path / "bare"), str(data / "heldout-0000.tar")]) == 1
    assert "pass --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["hf", "open_clip", "big_vision"])
def test_export_reads_back_bit_for_bit(format, exported, tmp_path):
    assert main(["export", str(exported), str(tmp_path / "out"), "--format", format]) == 0
    before = siglip2.from_pretrained(exported).state_dict()
    after = siglip2.from_pretrained(tmp_path / "out").state_dict()
    assert all((after[name] == value).all() for name, value in before.items())


def test_doctor_passes_a_sound_model(capsys, exported):
    assert main(["doctor", str(exported)]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_doctor_finds_an_untrained_temperature_and_missing_text(capsys, tmp_path):
    model = siglip2.create_model("siglip2-tiny-patch8-32", text_length=8, init_temperature=1.0)
    siglip2.save_pretrained(model, tmp_path)
    assert main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAILED trained temperature: exp(logit_scale) is 1.00" in out
    assert "no tokenizer.json in the folder" in out
