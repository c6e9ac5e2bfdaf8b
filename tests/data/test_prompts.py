from tacq_vllm.data.prompts import (
    MultipleChoice,
    WordProblem,
    format_gsm8k,
    format_mmlu,
    format_spider,
)


def test_mmlu() -> None:
    shot = MultipleChoice("Which is a colour? ", ("one", "red", "run", "up"), "B")
    asked = MultipleChoice("Which is a number?", ("two", "red", "run", "up"), "A")
    prompt, completion = format_mmlu("plain_common_words", [shot], asked)
    assert prompt == (
        "The following are multiple choice questions (with answers) about plain "
        "common words.\n"
        "\n"
        "Which is a colour?\n"
        "A. one\n"
        "B. red\n"
        "C. run\n"
        "D. up\n"
        "Answer: B\n"
        "\n"
        "Which is a number?\n"
        "A. two\n"
        "B. red\n"
        "C. run\n"
        "D. up\n"
        "Answer:"
    )
    assert completion == " A"


def test_gsm8k() -> None:
    shot = WordProblem("Two and two?", "2 + 2 = <<2+2=4>>4.\n#### 4")
    asked = WordProblem("One and one, twice?", "<<1+1=2>>2, then <<2*2=4>>4.\n#### 4")
    prompt, completion = format_gsm8k([shot], asked)
    assert prompt == (
        "Question: Two and two?\n"
        "Answer: 2 + 2 = 4.\n"
        "#### 4\n"
        "\n"
        "Question: One and one, twice?\n"
        "Answer:"
    )
    assert completion == " 2, then 4.\n#### 4"


def test_gsm8k_keeps_other_angle_brackets() -> None:
    asked = WordProblem("Order?", "1 < 2 and 3 > 2, so <<3-1=2>>2.\n#### 2")
    _, completion = format_gsm8k([], asked)
    assert completion == " 1 < 2 and 3 > 2, so 2.\n#### 2"


def test_spider() -> None:
    prompt, completion = format_spider(
        "CREATE TABLE cat (name text);\n", "How many cats?", "SELECT count(*) FROM cat"
    )
    assert prompt == (
        "CREATE TABLE cat (name text);\n\n-- Question: How many cats?\n-- SQL:\n"
    )
    assert completion == "SELECT count(*) FROM cat"
