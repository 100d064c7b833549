"""`python -m locfast.report FOLDER...`: write FOLDER/report.html, one file that loads nothing."""

from __future__ import annotations

from pathlib import Path

from locfast.errors import UserError


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run, a probe, a comparison or an analysis, from what lies there.

    Raises UserError when `folder` is none of these.
    """
    from locfast.report.page import write_page

    if (folder / "compare.json").is_file():
        from locfast.report.comparison import comparison_page

        html = comparison_page(folder)
    elif (folder / "analyze.json").is_file():
        from locfast.report.analysis import analysis_page

        html = analysis_page(folder)
    elif _is_run(folder):
        from locfast.report.run import run_page

        html = run_page(folder)
    elif (folder / "probe.json").is_file():
        from locfast.report.probe import probe_page

        html = probe_page(folder)
    else:
        raise UserError(
            f"A report of {folder} was asked for, but it is no run folder of locfast (no config.yaml that locfast "
            "wrote), and holds neither the probe.json of a probe nor the compare.json of a comparison nor the "
            "analyze.json of an analysis. Give the folder that `python -m locfast.train`, `probe` or "
            "`analyze` named at its end, for example runs/maskembed-demo."
        )
    return write_page(folder / "report.html", html)


def _is_run(folder: Path) -> bool:
    if not (folder / "config.yaml").is_file():
        return False  # without the engine's imports, which take seconds
    from locfast.engine.run_folder import RunFolder

    return RunFolder(folder).is_run()
