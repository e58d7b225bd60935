"""Tables of the suite signal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.signal.comparison import CONSTANT

LEAST_VARIANCE = 0.01
ROLLOUTS_SHOWN = (1, 2, 5, 10, 20)


def interval(row: Row, name: str) -> str:
    """Format a value with its interval."""
    return f"{_digits(row[name])} ({_digits(row[f'{name}_low'])} to {_digits(row[f'{name}_high'])})"


def _digits(value: float) -> str:
    """Format a value; one without bound, the quotient of a mean that is too small to measure, as such."""
    if abs(value) > 1e3:
        return "any" if value > 0 else "-any"
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"


def base_of(report: Row) -> Row:
    """Return the row of the constant critic of a case."""
    return next(row for row in report["rows"] if row["estimator"] == CONSTANT)


def predicted_times(report: Row, row: Row) -> float | None:
    """Return the predicted signal of a row, relative to that of the constant critic."""
    if row.get("predicted") is None:
        return None
    return row["predicted"] / base_of(report)["predicted"]


def predictions_that_hold(report: Row) -> str:
    """Count the predicted signals, relative to the constant critic's, that are within 1% of the measured interval."""
    base = base_of(report)
    predicted = [(row, predicted_times(report, row)) for row in report["rows"] if row is not base]
    holds = [row["times_low"] * 0.99 <= times <= row["times_high"] * 1.01 for row, times in predicted if times]
    return f"{sum(holds)} of {len(holds)}"


def walks(reports: Mapping[str, Row]) -> dict[str, Row]:
    """Return the reports whose rows are all algorithms, by case."""
    return {name: report for name, report in reports.items() if not name.startswith("ratios")}


def _rows(folder: Path) -> dict[str, Row]:
    return results.load(folder, "signal")["cases"]


def estimators_table(folder: Path) -> str:
    """Return a line per estimator, and two columns per case: measured and predicted."""
    return _estimators(walks(_rows(folder)))


def _estimators(reports: Mapping[str, Row]) -> str:
    names = list(dict.fromkeys(row["estimator"] for report in reports.values() for row in report["rows"]))
    found = {case: {row["estimator"]: row for row in report["rows"]} for case, report in reports.items()}
    columns: results.Columns = {"estimator": lambda name: name}
    for case, report in reports.items():
        of_case = found[case]
        columns[_short(case)] = lambda name, of_case=of_case: (
            interval(of_case[name], "times") if name in of_case else ""
        )
        columns[f"{_short(case)}, predicted"] = lambda name, of_case=of_case, report=report: (
            predicted_times(report, of_case[name]) if name in of_case else None
        )
    return results.markdown([name for name in names if ", seed " not in name], columns)


def _short(case: str) -> str:
    return case.removeprefix("walks: ").replace("smollm2", "SmolLM2, sums")


def critics_table(folder: Path) -> str:
    """Return a line per case and trained critic: what it explains after some rollouts, and its signal."""
    rows = []
    for case, report in walks(_rows(folder)).items():
        if report["success_variance"] < LEAST_VARIANCE:
            continue  # there is nothing to explain
        by_name = {row["estimator"]: row for row in report["rows"]}
        for name, curves in report["explained_by_rollout"].items():
            seeds = [by_name[f"{name}, seed {seed}"] for seed in range(len(curves))]
            explained = {
                f"after {count}": statistics.fmean(curve[count - 1] for curve in curves)
                for count in ROLLOUTS_SHOWN
                if count <= len(curves[0])
            }
            rows.append({"case": _short(case), "critic": name.removeprefix("sppo, "), **explained, "seeds": seeds})
    columns: results.Columns = {
        "case": lambda row: row["case"],
        "critic": lambda row: row["critic"],
        **{
            f"after {count}": lambda row, count=count: f"{row[f'after {count}']:.2f}" if f"after {count}" in row else ""
            for count in ROLLOUTS_SHOWN
        },
        "signal, times a constant's": lambda row: "; ".join(interval(each, "times") for each in row["seeds"]),
    }
    return results.markdown(rows, columns)


def ratios_table(folder: Path) -> str:
    """Return a line per number of updates and level of the ratio."""
    rows = [row for name, report in _rows(folder).items() if name.startswith("ratios") for row in report["rows"]]
    columns: results.Columns = {
        "updates before": lambda row: row["updates"],
        "weights": lambda row: row["estimator"],
        "signal, times that of fresh responses": lambda row: interval(row, "times"),
        "alignment": lambda row: interval(row, "alignment"),
    }
    return results.markdown(rows, columns)


def cases_table(folder: Path) -> str:
    """Return a line per case: facts about its policy."""
    rows = [{"case": _short(name), **report} for name, report in walks(_rows(folder)).items()]
    columns: results.Columns = {
        "case": lambda row: row["case"],
        "tokens": lambda row: row["tokens"],
        "rate of success": lambda row: row["success"],
        "its standard deviation over prompts": lambda row: row["success_variance"] ** 0.5,
        "squared norm of a wrong response's score, times a right one's": lambda row: (
            row["norms"]["wrong"] / row["norms"]["right"]
        ),
        "signal of 64 responses, constant critic": lambda row: interval(base_of(row), "signal"),
        "predictions within 1% of the interval": predictions_that_hold,
    }
    return results.markdown(rows, columns)


def bias_table(folder: Path) -> str:
    """Return a line per biased estimator and case: the alignment of its mean with the gradient."""
    rows = [
        {"case": _short(name), **row}
        for name, report in walks(_rows(folder)).items()
        for row in report["rows"]
        if row["estimator"].startswith(("grpo", "ppo, trained"))
    ]
    columns: results.Columns = {
        "case": lambda row: row["case"],
        "estimator": lambda row: row["estimator"],
        "alignment": lambda row: interval(row, "alignment"),
    }
    return results.markdown(rows, columns)


def summary(reports: Mapping[str, Row]) -> str:
    """Return the text that the command prints."""
    columns: results.Columns = {
        "case": lambda row: row["case"],
        "estimator": lambda row: row["estimator"],
        "signal": lambda row: interval(row, "signal"),
        "times": lambda row: interval(row, "times"),
        "predicted": lambda row: row.get("predicted"),
    }
    rows = [{**row, "case": name} for name, report in reports.items() for row in report["rows"]]
    return results.table(rows, columns)


TABLES: dict[str, Callable[[Path], str]] = {
    "signal": estimators_table,
    "signal-cases": cases_table,
    "signal-critics": critics_table,
    "signal-ratios": ratios_table,
    "signal-bias": bias_table,
}
