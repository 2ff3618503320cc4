"""The paper's tables, filled from run records, W&B or published curves.

layout       what a table is before it has values
layouts      the paper's: which run stands where, and the values printed there
sources      run directories, W&B projects and published CSVs as runs
selection    the runs of one table, scale and set of settings
statistics   the arithmetic, pure
table        layout + runs -> a filled table
rendering    text, Markdown, LaTeX, CSV, JSON
"""
