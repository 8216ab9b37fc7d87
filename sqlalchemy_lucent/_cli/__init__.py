"""The command ``lucent``. Nothing here is a public name; the command's behaviour is.

``run`` turns what a command raises into a sentence and an exit code; ``commands`` has one function
per command, ``rotate`` and ``doctor`` what the two larger ones do; ``database`` finds the database
and the models; ``terminal`` writes.
"""
