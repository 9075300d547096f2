import os

import pytest
import torch

from siglip2.data.tokenizer import Siglip2Tokenizer, check_tokenizer, get_tokenizer
from siglip2.data.train_tokenizer import train_tokenizer
from siglip2.errors import TextError

CAPTIONS = [
    "a red heart",
    "ein rotes Herz",
    "красное сердце",
    "赤いハート",
    "the cat",
    "two dogs",
] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=400, text_length=16)


def transformers_tokenizer(tokenizer, tmp_path, *, eos=True, bos=False, lower=True, **options):
    """What a user may hand over: our vocabulary behind transformers' own padding and templates."""
    from tokenizers import Tokenizer, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])]
    )
    template = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    defaults = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**defaults, **options})


def test_ids_are_lower_cased_end_once_and_are_padded_right(tokenizer):
    ids = tokenizer(["A Red HEART", "a red heart", ""])
    assert ids.dtype == torch.int64
    assert ids.shape == (3, 16)
    assert torch.equal(ids[0], ids[1])
    assert ids[2].tolist() == [1] + [0] * 15
    row = ids[0].tolist()
    end = row.index(1)
    assert end > 0
    assert row[end:] == [1] + [0] * (15 - end)
    assert 2 not in row


def test_eos_survives_truncation(tokenizer):
    whole = tokenizer.encode(["cat " * 3])[0]
    long = tokenizer(["cat " * 100])[0].tolist()
    assert long[-1] == 1
    assert long.count(1) == 1
    assert long[:3] == whole[:3]


def test_special_tokens_written_in_a_caption_are_text(tokenizer):
    row = tokenizer(["a <eos> b"])[0].tolist()
    assert row.count(1) == 1
    assert tokenizer.decode(torch.tensor(row)) == "a <eos> b"


def test_unseen_scripts_fall_back_to_bytes_and_decode(tokenizer):
    row = tokenizer(["ሰላም"])[0]
    assert 3 not in row.tolist()
    assert tokenizer.decode(row) == "ሰላም"


def test_training_is_deterministic_and_saves(tokenizer, tmp_path):
    again = train_tokenizer(reversed(CAPTIONS), vocab_size=400, text_length=16)
    first, second = tokenizer.save(tmp_path / "a"), again.save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    loaded = get_tokenizer(tmp_path / "a", text_length=16)
    assert torch.equal(loaded(CAPTIONS), tokenizer(CAPTIONS))
    assert loaded.vocab_size == tokenizer.vocab_size <= 400
    assert (loaded.pad_id, loaded.eos_id, loaded.bos_id) == (0, 1, 2)


def test_training_needs_room_for_specials_and_bytes():
    with pytest.raises(TextError, match="vocab_size must be at least 262"):
        train_tokenizer(CAPTIONS, vocab_size=100)


def test_text_length_must_hold_a_token_and_eos(tokenizer):
    with pytest.raises(TextError, match="text_length must be at least 2"):
        get_tokenizer(tokenizer, text_length=1)


def test_a_files_own_bos_padding_and_truncation_do_not_matter(tokenizer, tmp_path):
    from tokenizers import Tokenizer, processors

    path = tokenizer.save(tmp_path)
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    backend.enable_padding(direction="left", length=5)
    backend.enable_truncation(2)
    backend.save(str(path))
    ids = get_tokenizer(path, text_length=16)
    check_tokenizer(ids, 16)
    assert torch.equal(ids(CAPTIONS), tokenizer(CAPTIONS))


def test_sentencepiece_model(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "captions.txt"
    corpus.write_text("\n".join(CAPTIONS).lower(), "utf-8")
    options = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True}
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>"}
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "t"),
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
        **ids,
    )
    tokenizer = get_tokenizer(tmp_path / "t.model", text_length=16)
    check_tokenizer(tokenizer, 16)
    row = tokenizer(["A Red Heart"])[0]
    assert tokenizer.decode(row) == "a red heart"
    assert get_tokenizer(tokenizer.save(tmp_path / "saved"), text_length=16)(["x"]).shape == (1, 16)


def test_wrong_special_ids_are_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "a": 2}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(TextError, match="<pad> at 1 and <eos> at 0; SigLIP 2 needs 0 and 1"):
        get_tokenizer(tmp_path)


def test_a_correct_transformers_tokenizer_gives_our_ids(tokenizer, tmp_path):
    theirs = get_tokenizer(transformers_tokenizer(tokenizer, tmp_path), text_length=16)
    assert torch.equal(theirs(CAPTIONS), tokenizer(CAPTIONS))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        pytest.param(
            {"padding_side": "left"}, r"pads on the left \(set padding_side='right'\)", id="left"
        ),
        pytest.param({"bos": True}, r"adds BOS \(id 2\)", id="bos"),
        pytest.param({"lower": False}, "does not lower-case", id="case"),
        pytest.param({"eos": False}, "adds no EOS", id="eos"),
        pytest.param({"pad_token": "<eos>"}, r"pads with id 1 \(need 0\)", id="pad"),
    ],
)
def test_faulty_transformers_tokenizers_are_refused(tokenizer, tmp_path, options, fault):
    theirs = transformers_tokenizer(tokenizer, tmp_path, **options)
    with pytest.raises(TextError, match=f"^tokenizer {fault}; SigLIP 2 needs lower-cased"):
        get_tokenizer(theirs, text_length=16)
    assert get_tokenizer(theirs, text_length=16, strict=False)(["a"]).shape == (1, 16)


def test_several_faults_are_all_named(tokenizer, tmp_path):
    theirs = transformers_tokenizer(tokenizer, tmp_path, bos=True, eos=False, lower=False)
    with pytest.raises(TextError, match=r"adds BOS \(id 2\), adds no EOS, does not lower-case"):
        get_tokenizer(theirs, text_length=16)


def test_a_callable_that_cuts_eos_off_is_refused(tokenizer):
    wide = get_tokenizer(tokenizer, text_length=200)
    with pytest.raises(TextError, match="cuts EOS off long texts"):
        get_tokenizer(lambda texts: wide(texts)[:, :16], text_length=16)
    with pytest.raises(TextError, match=r"need ids \(5, 16\) for 5 texts; got \(5, 200\)"):
        get_tokenizer(lambda texts: wide(texts), text_length=16)


def test_missing_files_are_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(TextError, match=r"has neither tokenizer.json nor tokenizer.model"):
        get_tokenizer(tmp_path)
    with pytest.raises(TextError, match=r"no tokenizer file '.*absent.json'"):
        get_tokenizer(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TextError, match=r"is not a tokenizer.json"):
        get_tokenizer(tmp_path / "broken.json")
    (tmp_path / "broken.model").write_text("{")
    with pytest.raises(TextError, match="is not a SentencePiece model"):
        get_tokenizer(tmp_path / "broken.model")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_args):
        raise hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(TextError, match="no tokenizer at 'org/name': it is no file or folder here"):
        get_tokenizer("org/name")


def test_a_tokenizer_keeps_its_vocabulary_at_another_length(tokenizer):
    longer = get_tokenizer(tokenizer, text_length=32)
    assert isinstance(longer, Siglip2Tokenizer)
    assert torch.equal(longer(["the cat"])[:, :16], tokenizer(["the cat"]))


GEMMA = os.environ.get("SIGLIP2_TEST_GEMMA", "")


@pytest.mark.skipif(not GEMMA, reason="SIGLIP2_TEST_GEMMA names no tokenizer.json of Gemma's")
def test_gemmas_own_vocabulary():
    tokenizer = get_tokenizer(GEMMA)
    check_tokenizer(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (256_000, 2)
    row = tokenizer(["A photo of a CAT"])[0]
    assert tokenizer.decode(row) == "a photo of a cat"
    assert (row[5:8].tolist(), row[-1].item()) == ([1, 0, 0], 0)
