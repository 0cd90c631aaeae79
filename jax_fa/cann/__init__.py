"""The entry with CANN's conventions (`score`), and everything that only CANN has.

(It imports nothing, so that the Ascend backend, far below the entry, can read `spec`.)
"""
