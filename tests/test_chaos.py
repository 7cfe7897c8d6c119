"""The short form of benchmarks/chaos.py: real processes, killed while they work."""

from pathlib import Path

from chaos import Plan, chaos


def test_kills_of_either_process_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    plan = Plan(jobs=3, kills=3, model=str(tiny_model), steps=(40, 60), mean_seconds=0.2)
    report = chaos(plan, tmp_path)
    assert report.faults == []
    assert report.kills == {"worker": 1, "supervisor": 1, "both": 1}
    assert report.attempts > report.jobs >= 3
