"""Loads the fixtures, one plugin per topic."""

pytest_plugins = ["fix_etcd", "fix_stores"]
