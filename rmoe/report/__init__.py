"""Writes a report of training runs, one HTML file, from their work dirs.

``work_dir.py`` reads a work dir, with ``scalars.py`` and ``log.py``.
``experts.py`` runs its last checkpoint on a few validation images, whose labels
it gets from ``labels.py``. ``figures.py`` and ``tables.py`` make charts and
tables of the results, and ``page.py`` puts them into the template. Importing
this package imports neither plotly nor jinja2.
"""
from rmoe.report.write import (
    DEFAULT_NAME,
    check_counts,
    missing_packages,
    write_report,
)

__all__ = ['DEFAULT_NAME', 'check_counts', 'missing_packages', 'write_report']
