"""The numbers behind the figures: what a fitted CMD has to show, as plain arrays, drawn by nobody here.

A file per family, ``cmdgpu.views.profiles.profiles(cmd)`` and so on: each takes a fitted ``CMD`` and answers
a frozen dataclass of NumPy arrays. ``cmdgpu.plot`` draws them and the report page embeds them, so that a
figure and the page cannot disagree. Nothing N-long is read: what is said of all rows comes from the sums of
the pass, what is said of single rows from the sample. Where no row moves the arrays are empty, or NaN, or
zero, as each of them says; no view refuses such a fit.
"""
