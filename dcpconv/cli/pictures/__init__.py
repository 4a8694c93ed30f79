"""Pictures of checkpoints: one self-contained HTML file that opens without a network.

Python says what there is to see, as plain data; ``page.js`` draws it.  No charting library: a grid
of cells, nested rectangles and a bar chart are a hundred lines, and one that is bundled would be
larger than every picture of ours.
"""
