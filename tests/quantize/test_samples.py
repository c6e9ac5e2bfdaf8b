import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tacq_vllm.data.errors import DataError
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.samples import Sample, SampleReader, join_tokens
from tests.conftest import (
    make_chat_tokenizer,
    make_text,
    make_tokenizer,
    scored_words,
    words,
)

CHAT = [
    {"role": "user", "content": "the old river"},
    {"role": "assistant", "content": "finds a city"},
    {"role": "user", "content": "again ."},
    {"role": "assistant", "content": "slowly"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_chat_tokenizer()


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are parts of words, with the space before them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([make_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_lines(path: Path, lines: list[Any]) -> str:
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    return str(path)


def read(
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    *,
    completions_only: bool = False,
    data_root: Path | None = None,
    seed: int = 0,
) -> list[Sample]:
    found = SampleReader(tokenizer, completions_only, data_root, seed).read(source)
    return list(found.samples)


def test_targets_are_the_next_tokens() -> None:
    tokens = torch.tensor([5, 6, 7, 8])

    assert Sample.of(tokens).targets().tolist() == [6, 7, 8]
    scored = torch.tensor([True, False, True, False])
    assert Sample(tokens, scored).targets().tolist() == [-100, 7, -100]


def test_joining() -> None:
    samples = [Sample.of(torch.tensor(ids)) for ids in ([1, 2], [3])]

    assert join_tokens(samples).tolist() == [1, 2, 3]
    assert join_tokens([]).tolist() == []


@pytest.mark.parametrize("completions_only", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_files(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    suffix: str,
    completions_only: bool,
) -> None:
    path = tmp_path / f"text{suffix}"
    content = make_text().encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    found = SampleReader(tokenizer, completions_only, None, 0).read(str(path))

    assert found.is_text
    (sample,) = found.samples
    assert words(tokenizer, sample.tokens) == make_text()
    assert bool(sample.scored.all())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_kind_of_line(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str
) -> None:
    lines = [
        {"text": "the old river", "id": 7},
        {"prompt": "the new city ", "completion": "sells a train"},
        {"messages": [{"role": "loud", "content": "the song"}]},
    ]
    content = "\n\n".join(json.dumps(line) for line in lines).encode()
    path = tmp_path / f"samples{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    found = SampleReader(chat_tokenizer, False, None, 0).read(str(path))

    assert not found.is_text
    samples = list(found.samples)
    assert all(bool(sample.scored.all()) for sample in samples)
    assert {words(chat_tokenizer, sample.tokens) for sample in samples} == {
        "the old river",
        "the new city sells a train",
        "<s> loud the song </s>",
    }


def test_lines_of_text_alone_are_text(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "text.jsonl", [{"text": "the"}, {"text": "old"}])

    assert SampleReader(tokenizer, False, None, 0).read(source).is_text


def test_the_order_is_that_of_the_seed(
    tokenizer: PreTrainedTokenizerFast, task_file: Path
) -> None:
    def order(seed: int) -> list[list[int]]:
        return [s.tokens.tolist() for s in read(tokenizer, str(task_file), seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    assert len(order(1)) == 40


def test_a_completion_is_scored_and_its_prompt_is_not(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    line = {"prompt": "the old river", "completion": " finds a city ."}
    source = write_lines(tmp_path / "task.jsonl", [line])

    (sample,) = read(tokenizer, source, completions_only=True)

    assert words(tokenizer, sample.tokens) == "the old river finds a city ."
    assert scored_words(tokenizer, sample) == "finds a city ."


def test_text_counts_as_a_whole_beside_tasks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [{"text": "the old river"}, {"prompt": "a", "completion": " city"}]
    source = write_lines(tmp_path / "mixed.jsonl", lines)

    samples = read(tokenizer, source, completions_only=True)

    assert {scored_words(tokenizer, s) for s in samples} == {"the old river", "city"}


@pytest.mark.parametrize(
    ("prompt", "completion", "scored"),
    [
        ("the old river", " finds a city.", " finds a city."),
        # Its first token holds the space that ends the prompt, too.
        ("the old river ", "finds a city.", "inds a city."),
        ("the old ri", "ver finds", "ver finds"),
        ("the old riv", "er finds", " finds"),
    ],
)
def test_a_token_that_is_also_of_the_prompt_is_not_scored(
    pieces: PreTrainedTokenizerFast,
    tmp_path: Path,
    prompt: str,
    completion: str,
    scored: str,
) -> None:
    line = {"prompt": prompt, "completion": completion}
    source = write_lines(tmp_path / "task.jsonl", [line])

    (sample,) = read(pieces, source, completions_only=True)

    assert pieces.decode(sample.tokens) == prompt + completion
    assert pieces.decode(sample.tokens[sample.scored]) == scored


def test_every_turn_of_the_assistant_is_scored(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])

    (sample,) = read(chat_tokenizer, source, completions_only=True)

    # The names of the roles are no words of the tokenizer.
    assert words(chat_tokenizer, sample.tokens) == (
        "<s> <unk> the old river </s> <s> <unk> finds a city </s> "
        "<s> <unk> again . </s> <s> <unk> slowly </s>"
    )
    assert scored_words(chat_tokenizer, sample) == "finds a city </s> slowly </s>"


def test_a_chat_that_the_assistant_opens(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT[1:3]}])

    (sample,) = read(chat_tokenizer, source, completions_only=True)

    assert scored_words(chat_tokenizer, sample) == "<s> <unk> finds a city </s>"


@pytest.mark.parametrize("completions_only", [False, True])
def test_a_chat_gets_no_second_first_token(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, completions_only: bool
) -> None:
    """The template writes the special tokens itself; before text one is put."""
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    lines = [{"messages": CHAT[:2]}, {"prompt": "the", "completion": " old"}]
    source = write_lines(tmp_path / "mixed.jsonl", lines)

    samples = read(chat_tokenizer, source, completions_only=completions_only)

    assert {words(chat_tokenizer, sample.tokens) for sample in samples} == {
        "<s> <unk> the old river </s> <s> <unk> finds a city </s>",
        "<s> the old",
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}"
        "{% if loop.last %} again {% endif %}{% endfor %}",
    ],
    ids=["counts", "marks the last"],
)
def test_a_template_that_does_not_write_turn_by_turn_is_refused(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    chat_tokenizer.chat_template = template
    source = write_lines(tmp_path / "chat.jsonl", [{"text": "a"}, {"messages": CHAT}])

    assert len(read(chat_tokenizer, source)) == 2
    with pytest.raises(QuantizeError, match=r"line 3: the chat template does not"):
        read(chat_tokenizer, source, completions_only=True)


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "the old river", "completion": ""},
        {"prompt": "", "completion": "river"},
        {"messages": CHAT[:1]},
    ],
)
def test_a_sample_without_a_completion_is_refused(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: Any
) -> None:
    source = write_lines(tmp_path / "task.jsonl", [line])

    assert len(read(chat_tokenizer, source)) == 1
    with pytest.raises(QuantizeError, match=r"line 1: no token of a completion"):
        read(chat_tokenizer, source, completions_only=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "none of `text`"),
        ('{"text": 3}', "none of `text`"),
        ('{"prompt": "the old river"}', "none of `text`"),
        ('{"messages": "the old river"}', "none of `text`"),
        ('{"messages": ["the old river"]}', "none of `text`"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "chat template"),
    ],
)
def test_bad_lines_are_named_by_their_number(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"text": "{make_text(20)}"}}\n\n{line}\n')

    with pytest.raises(
        (QuantizeError, DataError), match=rf"samples\.jsonl, line 3: .*{reason}"
    ):
        read(tokenizer, str(path))


def test_messages_that_the_template_cannot_render(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('roles\nmust alternate') }}"
    source = write_lines(tmp_path / "samples.jsonl", [{"messages": CHAT}])

    with pytest.raises(QuantizeError, match=r"line 1: .*roles must alternate"):
        read(chat_tokenizer, source)


@pytest.mark.parametrize("name", ["table.csv", "nothing", "archive.gz", "wikitext3"])
def test_an_unknown_source_is_named(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    with pytest.raises(QuantizeError, match=rf"'{name}': neither .*wikitext2.*\.jsonl"):
        read(tokenizer, name)


def test_a_file_that_does_not_exist(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        read(tokenizer, "nowhere.txt")


def test_questions_of_a_named_set(
    tokenizer: PreTrainedTokenizerFast, data_root: Path
) -> None:
    samples = read(tokenizer, "gsm8k", data_root=data_root, completions_only=True)

    assert len(samples) == 4
    assert {scored_words(tokenizer, sample) for sample in samples} == {
        "a river again",
        "a city again",
        "a garden again",
        "a song again",
    }


def test_text_of_a_named_set(
    tokenizer: PreTrainedTokenizerFast, data_root: Path
) -> None:
    reader = SampleReader(tokenizer, True, data_root, 0)

    found = reader.read("wikitext2")

    assert found.is_text
    (sample,) = found.samples
    assert words(tokenizer, sample.tokens) == make_text()
    assert bool(sample.scored.all())
