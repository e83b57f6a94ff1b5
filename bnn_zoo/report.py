from pathlib import Path
def write_report(out, results):
    return Path(out) / "report.html"
