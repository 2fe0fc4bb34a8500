"""The one pass over all rows, out of core: plan -> read -> compute -> write -> merge.

``plan`` cuts the units into blocks that fit a byte budget, or refuses; ``reader`` fills time-major host slots
ahead; ``device`` takes them there and back; ``passes`` says what is done to a unit; ``engine`` is the loop.
"""
