"""compare --task retrieval: cases are what they claim, answers are greedy generation's, errors are true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from eval_models import make_model, text_of
from ggml_ext.cli.entry import app
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.measure import proportion, retrieval
from ggml_ext.measure.subjects import Subject
from ggml_ext.measure.tasks import filler, templates
from ggml_ext.measure.tasks.cases import NEEDLE_SHARE, Case, Spec, make_case
from ggml_ext.measure.tasks.filler import Filler
from ggml_ext.measure.tasks.templates import HELD_OUT, STATEMENTS, TASKS, TRAINING
from ggml_ext.runtime.cache_types import PLAIN, CacheTypes
from ggml_ext.runtime.llama import Model

PIECE = re.compile(r" ?[A-Za-z]+|\S")
IDS: dict[str, int] = {}
NAMES: list[str] = []


def tokenize(text: str) -> NDArray[np.int32]:
    """A word with the blank before it, or a mark, is a token; 0 stands before all."""
    for piece in PIECE.findall(text):
        if piece not in IDS:
            NAMES.append(piece)
            IDS[piece] = len(NAMES)
    return np.array([0, *(IDS[piece] for piece in PIECE.findall(text))], np.int32)


def text_from(tokens: NDArray[np.int32]) -> str:
    return "".join(NAMES[token - 1] for token in tokens if token > 0)


@pytest.fixture(scope="module")
def made() -> Filler:
    sentences = filler.made_sentences(1000, np.random.default_rng(0))
    return Filler.of(sentences, lambda sentence: len(tokenize(sentence)) - 1)


def statements_in(case: Case, sets: dict[str, tuple[templates.Template, ...]]) -> list[tuple[int, str]]:
    """Place (in characters) and text of every statement of the case's task."""
    text = text_from(case.text)
    found = []
    for template in sets[case.spec.task]:
        pattern = re.escape(template.statement)
        for field in ("thing", "name", "value"):
            pattern = pattern.replace(
                re.escape("{" + field + "}"), "[a-z, ]+?" if field == "value" else "[a-z]+"
            )
        found += [(match.start(), match[0]) for match in re.finditer(pattern, text)]
    return sorted(found)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [512, 2048])
def test_cases_are_what_they_claim(made: Filler, task: str, length: int) -> None:
    """Length, depth, share of the statements, words of the text itself, an answer that stands in it."""
    for seed, depth in enumerate((0.1, 0.5, 0.9)):
        case = make_case(Spec(task, length, depth, seed), made, tokenize, HELD_OUT)
        text, asked = text_from(case.text), text_from(case.asked)
        answer = text_from(case.asked[case.answers])
        assert length - 40 < len(case.text) + len(case.asked) <= length
        statements = statements_in(case, HELD_OUT)  # type: ignore[arg-type]
        fewest, most = STATEMENTS[task]
        assert fewest <= len(statements) <= most
        assert sum(len(tokenize(f" {found}")) - 1 for _, found in statements) * NEEDLE_SHARE <= length
        around = text
        for _, found in statements:
            around = around.replace(found, "")
        words = set(re.findall("[A-Za-z]+", " ".join([answer, *(found for _, found in statements)])))
        stated = {word for template in HELD_OUT[task] for word in templates.template_words(template)}
        assert words - stated <= set(re.findall("[A-Za-z]+", around))
        repeated = asked.rpartition("? ")[2].strip()  # without a question before it
        first = repeated.split(". ")[0].rstrip(".")
        place = next(place for place, found in statements if found.startswith(f"{first}."))
        assert place / len(text) == pytest.approx(depth, abs=0.06)
        if task == templates.CHAIN:
            assert len(answer.split()) == len(statements)
            assert all(f" {sentence}." in text for sentence in repeated.split(". "))
        else:
            assert repeated.endswith(answer)


def test_equal_arguments_give_equal_cases_and_seeds_differ(made: Filler) -> None:
    spec = Spec("several-keys", 1024, 0.5, 7)
    one, two = (make_case(spec, made, tokenize, HELD_OUT) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    assert not np.array_equal(one.asked, make_case(spec._replace(seed=8), made, tokenize, HELD_OUT).asked)


def test_distractors_share_a_thing_or_a_name() -> None:
    template = TRAINING["distractors"][0]
    made = templates.make_needles("distractors", template, iter([f"w{i}" for i in range(99)]), 4)
    asked, thing, name, other = (re.findall(r"w\d+", statement)[:2] for statement in made.statements)
    assert (thing[0], name[1]) == (asked[0], asked[1])
    assert thing[1] != asked[1]
    assert name[0] != asked[0]
    assert len({*asked, *thing, *name, *other}) == 5


def test_a_chain_leads_from_the_question_through_all_statements() -> None:
    made = templates.make_needles("chain", TRAINING["chain"][0], iter("abcdefg"), 3)
    assert made.statements == tuple(f"After the {a} comes the {b}." for a, b in ("ab", "bc", "cd"))
    assert made.steps == (
        ("After the a comes the", "b"),
        (". After the b comes the", "c"),
        (". After the c comes the", "d"),
    )


def test_questions_end_as_statements_begin_up_to_the_value() -> None:
    for group in (*TRAINING.values(), *HELD_OUT.values()):
        for template in group:
            assert template.question.endswith(template.again)


def test_a_pass_key_that_is_asked_for_is_said_twice() -> None:
    """Once, small models of text lose a word of it at 512 tokens already."""
    for template in HELD_OUT[templates.PASS_KEY]:
        made = templates.make_needles("pass-key", template, iter("abcdefg"), 1)
        assert made.statements[0].count(f" {made.steps[0][1]}.") == 2


def test_held_out_wordings_are_not_among_those_of_training() -> None:
    trained = {template.statement for group in TRAINING.values() for template in group}
    assert not trained & {template.statement for group in HELD_OUT.values() for template in group}
    sentences = " ".join(filler.made_sentences(3000, np.random.default_rng(1)))
    for group in (*TRAINING.values(), *HELD_OUT.values()):
        for template in group:
            fixed = max(re.split(r"\{\w+\}", template.statement), key=len).strip(" .")
            assert len(fixed.split()) < 3 or fixed not in sentences


def test_all_words_of_statements_are_words_of_the_made_text() -> None:
    """No word is in statements alone, so no token gives them away."""
    words = set(re.findall("[A-Za-z]+", " ".join(filler.made_sentences(8000, np.random.default_rng(2)))))
    assert set(filler.vocabulary()) == words


def test_errors_name_the_remedy(made: Filler) -> None:
    with pytest.raises(GgmlExtError, match=r"length 128: too short .* use --lengths from \d+"):
        make_case(Spec("list", 128, 0.5, 0), made, tokenize, HELD_OUT)
    with pytest.raises(GgmlExtError, match="fewer than the 100000 that stand around"):
        make_case(Spec("list", 100_000, 0.5, 0), made, tokenize, HELD_OUT)
    poor = Filler.of(["The same words again."] * 500, lambda sentence: len(tokenize(sentence)) - 1)
    with pytest.raises(GgmlExtError, match="only 2 different common words"):
        make_case(Spec("pass-key", 512, 0.5, 0), poor, tokenize, HELD_OUT)

    def joined(text: str) -> NDArray[np.int32]:
        return np.array([0, *(len(text) - i for i in range(len(text) // 6))], np.int32)

    with pytest.raises(GgmlExtError, match="joins words across blanks"):
        make_case(Spec("pass-key", 512, 0.5, 0), made, joined, HELD_OUT)


def test_wilson_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 5), (3, 7), (20, 20), (173, 200)):
        bounds = stats.binomtest(right, n).proportion_ci(0.95, "wilson")
        found = proportion.share(np.arange(n) < right)
        assert found.value == right / n
        assert found.ci95 == pytest.approx((bounds.low, bounds.high), abs=1e-6)


@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.0), (0.02, 0.05), (0.0, 0.1), (0.1, 0.3)])
@pytest.mark.parametrize("n", [20, 100])
def test_the_interval_of_a_paired_difference_holds_the_truth(n: int, gained: float, lost: float) -> None:
    """At least 93 % of 1000 draws; a plain Wald interval holds 60 % where 20 cases lose one in ten."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(1000):
        draw = random.random(n)
        base = (draw < lost) | (draw > 0.5)
        model = (draw > 0.5) | ((draw >= lost) & (draw < lost + gained))
        low, high = proportion.difference(model, base).ci95
        held += low <= gained - lost <= high
    assert held >= 930


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("retrieval") / "tiny.gguf")


def greedy(model: Model, tokens: NDArray[np.int32], count: int) -> list[int]:
    """What the model generates, token by token."""
    model.clear()
    done = 0
    found: list[int] = []
    for _ in range(count):
        positions = np.arange(done, done + len(tokens), dtype=np.int32)
        logits = model.decode(tokens, positions, np.zeros(len(tokens), np.int32), positions == positions[-1])
        done += len(tokens)
        found.append(int(logits[0].argmax()))
        tokens = np.array(found[-1:], np.int32)
    return found


@pytest.mark.parametrize("together", [False, True])
def test_right_is_what_greedy_generation_gives(tiny: Path, together: bool) -> None:
    """A case whose answers are the model's own generation is right; with a token of either step changed it is
    wrong."""
    with Model(tiny, threads=1) as model:
        model.start(n_ctx=128, n_seq=1, n_batch=64)
        tokens = model.tokenize(text_of(60).encode())
        first = greedy(model, tokens[:50], 5)
        asked = np.concatenate([tokens[40:50], first, tokens[50:55]]).astype(np.int32)
        second = greedy(model, np.concatenate([tokens[:40], asked]).astype(np.int32), 3)
        asked = np.concatenate([asked, second]).astype(np.int32)
        answers = np.isin(np.arange(len(asked)), [*range(10, 15), *range(20, 23)])
        case = Case(Spec("chain", 128, 0.5, 0), tokens[:40], asked, answers)
        found = retrieval.answer(model, case, 32, together=together)
        assert found["right"].all()
        assert found["nats"] > 0
        for at in (10, 13, 22):
            changed = asked.copy()
            changed[at] = (changed[at] + 1) % model.n_vocab
            found = retrieval.answer(model, case._replace(asked=changed), 32, together=together)
            assert not found["right"].any()


def test_rows_gate_by_the_base_and_pair_the_cases(tiny: Path) -> None:
    grid = retrieval.Grid((64, 128), 2, 5)
    specs = grid.specs()
    base, own = np.zeros(len(specs), retrieval.RECORD), np.zeros(len(specs), retrieval.RECORD)
    for i, spec in enumerate(specs):
        base["right"][i] = spec.task == "list" or (
            spec.task == "chain" and spec.length == 64 and spec.seed > 0
        )
        own["right"][i] = base["right"][i] and spec.depth > 0.5
    subject = Subject(tiny, PLAIN)
    row = retrieval.make_row(subject, specs, own, base, is_base=False)
    counted = [(cell["task"], cell["length"]) for cell in row["cells"] if cell["counted"]]
    assert counted == [("list", 64), ("list", 128)]
    assert (row["cases"], row["score"], row["score_diff"], row["of_base"]) == (20, 0.5, -0.5, 0.5)
    assert row["score_diff_ci95"][1] < -0.2
    cell = next(cell for cell in row["cells"] if cell["task"] == "list")
    assert [depth["score"] for depth in cell["depths"]] == [0, 1]
    first = retrieval.make_row(subject, specs, base, base, is_base=True)
    assert first["score"] == 1
    assert first["score_diff"] is None


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggml_ext.cli.entry", "compare", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained retrieval model, with its vocabulary of whole words."""
    torch = pytest.importorskip("torch")
    from devtools.retrieval_model.export import write_gguf
    from devtools.retrieval_model.model import Retriever, Shape
    from devtools.retrieval_model.vocabulary import Vocabulary

    path = tmp_path_factory.mktemp("retriever") / "untrained.gguf"
    words = Vocabulary()
    model = Retriever(Shape(hidden=64, layers=1, heads=2, kv_heads=1, ffn=64), len(words.tokens))
    torch.nn.init.normal_(model.blk[0].attn_output.weight)  # else it begins with no use of its cache
    write_gguf(path, model, words)
    return path


def test_command_writes_table_json_and_plot(retriever: Path, tmp_path: Path) -> None:
    """The made text by default; an untrained model finds nothing, so nothing is counted; the second model is
    the first with another cache."""
    out = tmp_path / "out.json", tmp_path / "out.png"
    done = cli(
        retriever, retriever, "--task", "retrieval", "--lengths", "512,600", "--depths", 2, "--cases", 1,
        "-t", 1, "-ctk", "q8_0", "--json", out[0], "--plot", out[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    base, other = json.loads(out[0].read_text())
    assert (base["cache_k"], other["cache_k"]) == ("f16", "q8_0")
    assert base.keys() == other.keys()
    assert base["score"] is base["of_base"] is None
    assert {(cell["task"], cell["length"]) for cell in base["cells"]} == {
        (task, length) for task in TASKS for length in (512, 600)
    }
    for cell in other["cells"]:
        assert (cell["cases"], cell["score"], cell["counted"], cell["score_diff"]) == (2, 0, False, 0)
        assert [depth["depth"] for depth in cell["depths"]] == [0.25, 0.75]
        assert cell["nats"] > 1
        assert cell["nats_diff"] != 0
    assert out[1].read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("not counted") == 20
    assert "nothing is counted" in done.stdout


def test_an_interrupted_run_goes_on(retriever: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases answered before a failure are not asked again, and the result is that of a run in one piece."""
    grid, asked = retrieval.Grid((512,), 1, 2), []
    whole = retrieval.judge(retriever, [retriever], None, grid, threads=1, cache=CacheTypes("q8_0", "q8_0"))
    answer = retrieval.answer

    def failing(model: Model, case: Case, *rest: Any, **more: Any) -> NDArray[np.void]:
        asked.append(case)
        if len(asked) == 14:
            raise KeyboardInterrupt
        return answer(model, case, *rest, **more)

    monkeypatch.setattr(retrieval, "answer", failing)
    arguments = {"threads": 1, "cache": CacheTypes("q8_0", "q8_0")}
    with pytest.raises(KeyboardInterrupt):
        retrieval.judge(retriever, [retriever], None, grid, **arguments)  # type: ignore[arg-type]
    assert retrieval.judge(retriever, [retriever], None, grid, **arguments) == whole  # type: ignore[arg-type]
    assert len(asked) == 21


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--task", "retrieval", "--lengths", "many"], 1, "--lengths many: no numbers of tokens"),
        (["--task", "retrieval", "--lengths", "64"], 1, "the made text: length 64: too short for the task"),
        (["--task", "retrieval", "-f", "TEXT"], 1, "text.txt: the text has 12 tokens, fewer than the 512"),
        (["--task", "retrieval", "--ctx", "512"], 2, "is not for --task"),
        (["--task", "retrieval", "--report", "r.md"], 2, "Invalid value for --report: is not for --task"),
        (["--lengths", "512", "-f", "TEXT"], 2, "needs --task retrieval"),
        (["--question-with-text", "-f", "TEXT"], 2, "for --question-with-text: needs --task retrieval"),
        ([], 2, "is needed without --task"),
    ],
)
def test_errors_of_the_command(
    retriever: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    (tmp_path / "text.txt").write_text("One book from the sea. The end.\n")
    given = [str(tmp_path / "text.txt") if argument == "TEXT" else argument for argument in arguments]
    done = CliRunner().invoke(app, ["compare", str(retriever), str(retriever), *given])
    assert done.exit_code == status, done.output
    assert message in re.sub(r"[\s│]+", " ", done.output)


def test_models_of_other_vocabularies_are_refused(retriever: Path, tiny: Path) -> None:
    with pytest.raises(GgmlExtError, match=r"tiny.gguf: its vocabulary is not that of"):
        retrieval.judge(retriever, [tiny], None, retrieval.Grid((4096,), 1, 1))


def test_lengths_beyond_the_trained_context_are_said(
    retriever: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    retrieval.judge(retriever, [retriever], None, retrieval.Grid((2100,), 1, 1), threads=1)
    assert "--lengths 2100 is beyond the 2048 tokens" in capfd.readouterr().err
