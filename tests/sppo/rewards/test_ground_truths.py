"""The graders on real ground truths: an answer is right beside itself and wrong when made wrong.

A sample is here; the files of public math data are read where ``shared/data`` lies beside the repository.

What cannot be tested so, and why: 53 of Minerva's 240 answers, which the file cuts off at their first closing brace
(math refuses them); and the unit in two of MATH-500's, ``15\\mbox{ cm}^2``, since math-verify does not read units.
"""

import re
from pathlib import Path

import pytest

from sppo.rewards import builtin as rewards

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
INTEGERS = ["math__aime_repeated_8x_240", "math__aime2025_2025", "math__amc23_2025"]
MINERVA_TOLERANCE = 0.01

_NUMBER = re.compile(r"(?<!\}\^)(?:\d+(?:,(?:\\!\s*)?\d{3})+|\d*\.\d+|\d+\.?)")  # none that is the power of a unit
_WORD = re.compile(r"\\text\s*\{\(?(\w+)\)?\}")


def perturbed(answer, tolerance=0.0):
    """The answer made wrong: its first and its last number times 100, over 100, plus 1, and of the other sign.

    One without a number becomes another word, or is changed so as a whole.
    """
    for _ in range(2):  # \frac12 to \frac{1}{2}, \sqrt2 to \sqrt{2}
        answer = re.sub(r"(\\frac|\\sqrt|\\frac\{\d+\})\s*(\d)", r"\1{\2}", answer)
    numbers = list(_NUMBER.finditer(answer))
    for number in {m.start(): m for m in (numbers[:1] + numbers[-1:])}.values():
        before, after = answer[: number.start()], answer[number.end() :]
        value = float(re.sub(r"[^\d.]", "", number[0]))
        for other in {value * 100, value / 100, value + 1} - {value}:
            if abs(other - value) > tolerance * value:
                yield before + f"{other:.10f}".rstrip("0").rstrip(".") + after
        if value:
            yield with_other_sign(before) + answer[number.start() :]
    if word := _WORD.search(answer):
        yield answer.replace(word[1], "another" if len(word[1]) > 1 else chr(ord(word[1]) + 1))
    elif not numbers and "=" in answer:
        yield f"{answer}+1"
    elif not numbers:
        yield from (f"-({answer})", f"{answer} + 1", f"100({answer})", rf"\frac{{{answer}}}{{100}}")


def with_other_sign(before):
    """What stands before a number, with its sign turned."""
    head = before.rstrip()
    if head.endswith("+"):
        return head[:-1] + "-"
    if head.endswith("-"):
        return head[:-1] + ("+" if re.search(r"[\w)}]\s*$", head[:-1]) else "")
    return before + "-"


def grade(reward, given, right, **options):
    return reward(["p"], [given], answer=[right], **options)[0]


SAMPLE = [
    "34",
    "-7",
    "0",
    "025",
    "0.75",
    "27.0",
    ".35625",
    "-2.5e-3",
    "1,234",
    r"10,\!080",
    "4.5e33",
    "1.325e-27",
    "2e-8",
    "-1./3",
    "+2",
    r"\frac{3}{4}",
    r"-\frac{14}{3}",
    r"\dfrac{9}{7}",
    r"\frac43",
    r"\frac 59",
    r"\frac9{19}",
    r"\frac{270}7\text{ degrees}",
    r"137 \frac{1}{2}",
    r"3\sqrt{13}",
    r"11\sqrt2",
    r"\frac{\sqrt{21}}{5}",
    r"1 \pm \sqrt{19}",
    "2+3i",
    r"\pi",
    r"5\pi",
    r"\frac{20000}{\pi}",
    "2^{10}",
    r"\ln 2 + i\pi / 3",
    r"(3, \frac{\pi}{2})",
    r"\left( \frac{3}{2}, -13 \right)",
    "(1,-16,-4,43)",
    r"(2,12) \cup (12,102)",
    r"(-\infty, 4]",
    r"\left(\frac{3}{5},\frac{8}{3}\right]",
    r"x \in [-2,7]",
    "1,-2",
    "3, 5, 7",
    r"\{1\pm\sqrt{5},-2\}",
    r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}",
    r"\begin{pmatrix} 1/5 & 0 \\ 0 & -1 \end{pmatrix}",
    "p - q",
    r"\cot x",
    "6r^2-4r-24",
    "(a+5)(b+2)",
    r"\frac{11+9a}{20}",
    r"-\tau \ln \Delta",
    r"3 \sin (2 t)",
    "x=5",
    "y = -2x",
    "5x - 7y + 11z + 4 = 0",
    "MR=SRMC",
    r"90^\circ",
    r"5.4 \text{ cents}",
    r"15\mbox{ cm}^2",
    r"\$32.50",
    r"10\%",
    "4210_{5}",
    "52_8",
    r"\text{Evelyn}",
    r"\text{(B)}",
    r"\text{June 20}",
]


@pytest.mark.parametrize("answer", SAMPLE)
def test_math_takes_an_answer_for_right_and_one_made_wrong_for_wrong(answer):
    for completion in (rf"Thus \boxed{{{answer}}}.", f"The final answer is ${answer}$."):
        assert grade(rewards.math, completion, answer) == 1.0, completion
    for wrong in perturbed(answer):
        assert rewards._read_math(wrong, 5), f"{wrong} cannot be read, so that it is wrong says nothing"
        assert grade(rewards.math, rf"\boxed{{{wrong}}}", answer) == 0.0, wrong


def test_a_number_without_its_base_is_taken_and_one_with_another_base_is_not():
    for given, right in (("204", 1.0), ("204_5", 1.0), ("204_{(5)}", 1.0), ("204_6", 0.0)):
        assert grade(rewards.math, rf"\boxed{{{given}}}", "204_{5}") == right
    assert grade(rewards.math, r"\boxed{10_2}", "10") == 0.0


def ground_truths(name):
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no {path.name} in shared/data beside the repository")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(path, columns=["reward_model"])["reward_model"].to_pylist()
    return sorted({row["ground_truth"] for row in rows})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [*zip(INTEGERS, (29, 30, 25), strict=True), ("math__math_500", 301)])
def test_competition_answers(name, count):
    answers = ground_truths(name)
    assert len(answers) == count
    for reward in (rewards.math, rewards.numeric) if name in INTEGERS else (rewards.math,):
        for answer in answers:
            assert grade(reward, rf"\boxed{{{answer}}}", answer) == 1.0, answer
            for wrong in perturbed(answer):
                assert grade(reward, rf"\boxed{{{wrong}}}", answer) == 0.0, (answer, wrong)


@pytest.mark.slow
def test_minerva_with_its_tolerance():
    answers = ground_truths("math__minerva_math_2025_processed")
    cut_off = [answer for answer in answers if answer.count("{") > answer.count("}")]
    assert (len(answers), len(cut_off)) == (240, 53)
    for answer in cut_off:
        with pytest.raises(ValueError, match="cannot read the right answer"):
            grade(rewards.math, rf"\boxed{{{answer}}}", answer)
    for answer in sorted(set(answers) - set(cut_off)):
        assert grade(rewards.math, rf"\boxed{{{answer}}}", answer) == 1.0, answer
        for wrong in perturbed(answer, MINERVA_TOLERANCE):  # what is wrong with the tolerance is so without
            given = rf"\boxed{{{wrong}}}"
            assert grade(rewards.math, given, answer, tolerance=MINERVA_TOLERANCE) == 0.0, (answer, wrong)
