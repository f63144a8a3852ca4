"""The records of a run as Markdown and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.goals import Goal, attention_goal, linear_goal
from benchmarks.kernels.protocol import bandwidth_share, tokens_per_second
from benchmarks.kernels.records import Baseline, Environment, Failure, LeftOut, Record, Time, Verdict, to_fields
from benchmarks.kernels.sections import SECTIONS, Section
from benchmarks.runs import keep

__all__ = ["Line", "document", "has_failed", "lines_of", "markdown", "write"]

_MOST_NAMED = 12
_PROTOCOL = """\
Times are microseconds per launch: a CUDA graph holds one launch for every copy of the weights (or cache), together at
least 240 MB and four L2 caches, and goes through them in turn for about half a millisecond; median of at least 20
replays. *Cold* is that; *warm* is the same launch on one copy over and over, which a small matrix spends in the L2
cache. *Bandwidth* is (weights + scales + input + output bytes) / cold time, as a share of what copying 1 GiB reads and
writes per second in the same process. *Speed-up* is over the faster of cuBLAS in float16 and bfloat16 (for attention:
PyTorch's in float16) measured alike in the same process. A goal that could not be judged has a dash."""
_DECODING = """\
Not a whole language model, and not run through `KernelModel`: a stack of decoder layers of the shape named, of random
weights, and an output head in float16. Quantized stacks call the operators that the target calls (linear layers,
quantizers behind norms, appending, attention); what lies between them is PyTorch's and the same in every row. The
float16 row takes PyTorch's products and attention. A step is one new token for each sequence of the batch, after the
context named, replayed from a CUDA graph; embedding lookup and sampling are left out."""


@dataclass(frozen=True)
class Line:
    """A time, and what follows from it.

    Attributes:
        time: itself.
        share: of copy bandwidth; None where no bandwidth was measured.
        speedup: over the fastest baseline of its shape; None where there is none, and for baselines.
        goal: it is held to, if any.
        met: whether it reached that; None where there is no goal, or it could not be judged.
    """

    time: Time
    share: float | None
    speedup: float | None
    goal: Goal | None
    met: bool | None


def lines_of(section: str, records: Iterable[Record]) -> list[Line]:
    """The times of a section, compared."""
    mine = [r for r in records if r.section == section]
    bandwidth = next((r.copy_bandwidth for r in reversed(mine) if isinstance(r, Environment)), None)
    fastest: dict[str, float] = {}
    for record in mine:
        if isinstance(record, Baseline):
            fastest[record.shape] = min(record.cold, fastest.get(record.shape, record.cold))
    lines = []
    for record in mine:
        if not isinstance(record, Time):
            continue
        base = None if isinstance(record, Baseline) else fastest.get(record.shape)
        share = None if bandwidth is None else bandwidth_share(record.nbytes, record.cold, bandwidth)
        speedup = None if base is None else base / record.cold
        goal = _goal(section, record)
        lines.append(Line(record, share, speedup, goal, goal.is_met(share, speedup) if goal else None))
    return lines


def _goal(section: str, time: Time) -> Goal | None:
    if isinstance(time, Baseline):
        return None
    if section == "linear":
        rows, out_features, in_features = (int(n) for n in time.shape.split("x"))
        return linear_goal(time.name, rows, out_features, in_features)
    if section == "attention" and time.name != "float16":
        return attention_goal(int(time.shape.split("context ")[1]))
    return None


def has_failed(records: Iterable[Record]) -> bool:
    """Whether a check did not hold, or a case broke. A goal that was missed is no failure, nor is what was left out."""
    return any(isinstance(r, Failure) or (isinstance(r, Verdict) and not r.passed) for r in records)


def document(
    machine: Mapping[str, str], records: Sequence[Record], taken: Mapping[str, float], is_gpu: bool
) -> dict[str, Any]:
    """Everything as JSON: the records as they are, and what the tables say of the times."""
    return {
        "is_gpu": is_gpu,
        "machine": dict(machine),
        "failed": has_failed(records),
        "seconds": {name: round(seconds, 1) for name, seconds in taken.items()},
        "records": [to_fields(record) for record in records],
        "lines": [
            {
                **to_fields(line.time),
                "bandwidth_share": line.share,
                "speedup": line.speedup,
                "goal": None if line.goal is None else str(line.goal),
                "met": line.met,
            }
            for section in SECTIONS
            if section.is_timed
            for line in lines_of(section.name, records)
        ],
    }


def markdown(
    machine: Mapping[str, str], records: Sequence[Record], taken: Mapping[str, float], *, is_gpu: bool, command: str
) -> str:
    """Everything as Markdown.

    Args:
        machine: `machine.describe`; empty if nothing was measured.
        records: of all sections; none of a section says that it was not measured.
        taken: seconds of each section.
        is_gpu: whether a GPU was used; else the page says that its figures are none of a GPU.
        command: that fills the page.
    """
    parts = ["# Kernels on a GPU" if is_gpu else "# Kernels: a trial on a CPU, no GPU figures", ""]
    if machine:
        parts += [", ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
    if is_gpu:
        parts += [f"`{command}` writes this page. {_PROTOCOL}".replace("\n", " "), ""]
    else:
        parts += [f"`{command}` wrote this page, to try the benchmark where there is no GPU. Times are of small", ""]
        parts[-2] += " shapes on a CPU by the clock. They say nothing about the kernels."
    if records:
        parts += _summary(records)
    for section in SECTIONS:
        mine = [record for record in records if record.section == section.name]
        parts += [f"## {section.title}", ""]
        if section.name == "decoding":
            parts += [_DECODING.replace("\n", " "), ""]
        if not mine:
            parts += [f"Not measured. `{command}` fills this table.", ""]
            continue
        parts += _times(section, mine) if section.is_timed else _verdicts(mine)
        parts += _problems(mine)
        if section.name in taken:
            parts += [f"{taken[section.name]:.0f} s.", ""]
    return "\n".join(parts).rstrip() + "\n"


def write(
    path: Path,
    machine: Mapping[str, str],
    records: Sequence[Record],
    taken: Mapping[str, float],
    *,
    is_gpu: bool,
    command: str,
) -> None:
    """Writes ``path.md`` and ``path.json`` aside, then renames them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(machine, records, taken, is_gpu=is_gpu, command=command)
    aside = path.with_name(path.name + ".md.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path.with_name(path.name + ".md"))
    keep(path.with_name(path.name + ".json"), document(machine, records, taken, is_gpu))


def _summary(records: Sequence[Record]) -> list[str]:
    verdicts = [r for r in records if isinstance(r, Verdict)]
    judged = [line.met for s in SECTIONS if s.is_timed for line in lines_of(s.name, records) if line.met is not None]
    return [
        f"Checks: {sum(v.passed for v in verdicts)} of {len(verdicts)} hold. "
        f"Cases that broke: {sum(isinstance(r, Failure) for r in records)}. "
        f"Left out: {sum(isinstance(r, LeftOut) for r in records)}. "
        f"Goals met: {sum(judged)} of {len(judged)} judged.",
        "",
    ]


def _verdicts(records: Sequence[Record]) -> list[str]:
    verdicts = [r for r in records if isinstance(r, Verdict)]
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.name.split(":")[0], []).append(verdict)
    lines = ["| checked | held | the worst |", "|---|---|---|"]
    for name, group in groups.items():
        worst = max(group, key=lambda verdict: (not verdict.passed, verdict.measure))
        lines.append(f"| {name} | {sum(v.passed for v in group)} of {len(group)} | {_cell(worst.detail)} |")
    bad = [f"- **{_cell(v.name)}** does not hold: {_cell(v.detail)}" for v in verdicts if not v.passed]
    return [*lines, "", *bad, *([""] if bad else [])]


def _times(section: Section, records: Sequence[Record]) -> list[str]:
    environment = next((r for r in reversed(records) if isinstance(r, Environment)), None)
    parts = []
    if environment is not None:
        parts += [
            f"Copy bandwidth {environment.copy_bandwidth / 1e12:.3f} TB/s; an empty kernel takes "
            f"{environment.floor * 1e6:.2f} µs. {environment.timer}.",
            "",
        ]
    has_units = section.name == "decoding"
    header = ["shape", "format", "implementation", "cold µs", "warm µs", "bandwidth", "speed-up"]
    header += ["tokens/s"] if has_units else ["goal", "met"]
    parts += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    notes: dict[str, None] = {}
    for line in lines_of(section.name, records):
        time = line.time
        cells = [time.shape, time.name, time.implementation, _micro(time.cold), _micro(time.warm)]
        cells += [_dash(line.share, "{:.0%}"), _dash(line.speedup, "{:.2f}×")]
        if has_units:
            cells += [f"{tokens_per_second(time.units, time.cold):,.0f}"]
        else:
            met = {True: "yes", False: "**no**", None: "–"}[line.met]
            cells += ["" if line.goal is None else str(line.goal), "" if line.goal is None else met]
        if time.note:
            notes[f"- {time.name}, {time.implementation}: {time.note}"] = None
        parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return [*parts, "", *notes, *([""] if notes else [])]


def _problems(records: Sequence[Record]) -> list[str]:
    parts = []
    for failure in (r for r in records if isinstance(r, Failure)):
        parts += [f"- **{_cell(failure.name)}** broke: {_cell(failure.detail.strip().splitlines()[-1])}"]
    left = [r for r in records if isinstance(r, LeftOut)]
    for reason in dict.fromkeys(r.reason for r in left):
        names = [r.name for r in left if r.reason == reason]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        parts += [f"- Left out, {reason}: {'; '.join(names[:_MOST_NAMED])}{more}."]
    return [*parts, *([""] if parts else [])]


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.2f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def _dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
