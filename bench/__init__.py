"""How close to a plain file copy, and in how much memory?  Run with ``make bench``.

Every case runs in a fresh process and reports that process's own high-water mark.  (``VmHWM``, not
``ru_maxrss``: the latter is inherited across ``exec`` and reports the parent's peak.)  The floor is
``cp`` and ``sync`` of the same bytes on the same disk, timed next to every run of the case: a
conversion that touches every byte once cannot honestly beat it, unless the file system shares
blocks.
"""
