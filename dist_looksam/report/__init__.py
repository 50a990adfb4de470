"""Charts and pages of runs. The drawing packages are this package's extra `report`."""

from dist_looksam.errors import ConfigError

try:
    import altair  # noqa: F401
    import jinja2  # noqa: F401
    import vl_convert  # noqa: F401
except ImportError as error:
    raise ConfigError(
        f"drawing needs altair, vl-convert-python and jinja2, got no {error.name}; install them "
        f"with pip install 'dist-looksam[report]'."
    ) from None

from dist_looksam.report.curves import curves
from dist_looksam.report.probe import probe_figures

__all__ = ["curves", "probe_figures"]
