"""The only package that knows gRPC, protobuf, tenacity and etcd's messages."""

try:
    import etcd3.etcdrpc  # noqa: F401 - whether it can be imported is found out here, before any other module needs it
except TypeError as error:  # protobuf's "Descriptors cannot be created directly"
    raise ImportError(
        "the installed package 'etcd3' is the one of 2020, which can't be used with protobuf 4 or newer: "
        "pip uninstall etcd3, then pip install --force-reinstall cslab-etcd3==0.12.1"
    ) from error
except ModuleNotFoundError as error:
    if error.name not in {"etcd3", "etcd3.etcdrpc"}:  # something that etcd3 itself needs is missing: it says so
        raise
    raise ImportError(
        f"there is no module '{error.name}', which holds etcd's messages: "
        "pip uninstall any other package that is imported as 'etcd3', then pip install cslab-etcd3==0.12.1"
    ) from error
