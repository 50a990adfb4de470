"""Pictures of a run: its curves, and how sharpness moved between looks."""

from dist_looksam.report.curves import curves
from dist_looksam.report.probe import probe_figures

__all__ = ["curves", "probe_figures"]
