"""The command ``lucent``. Nothing here is a public name; the command's behaviour is.

``commands``, ``keys``, ``secrets`` and ``lifecycle`` have one function per command; ``rotate`` and
``doctor`` carry out the two larger ones. ``database`` finds the database and the models,
``terminal`` writes, and ``run`` turns what a command raises into a sentence and an exit code, by
``errors``.
"""
