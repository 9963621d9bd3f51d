"""A report of training runs: one HTML file, from what is in their work dirs.

``work_dir.py`` reads a work dir (``scalars.py``, ``log.py``), ``experts.py``
runs its last checkpoint on a few validation images (``labels.py``),
``figures.py`` and ``tables.py`` lay out what was found, ``page.py`` puts it
into the template. Importing this imports neither plotly nor jinja2.
"""
from rmoe.report.write import DEFAULT_NAME, missing_packages, write_report

__all__ = ['DEFAULT_NAME', 'missing_packages', 'write_report']
