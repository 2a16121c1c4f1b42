"""The participants, each a program of its own: packages that bring etcd's messages can't be imported side by side.

A driver runs with the interpreter that has its client installed, so that what drivers share needs nothing but Python.
"""
