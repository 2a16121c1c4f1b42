"""The only package that knows gRPC, protobuf, tenacity and etcd's messages."""

try:
    import etcd3.etcdrpc
except TypeError as error:  # protobuf's "Descriptors cannot be created directly"
    raise ImportError(
        "the installed package 'etcd3' is the one of 2020, which can't be used with protobuf 4 or newer: "
        "pip uninstall etcd3, then pip install --force-reinstall cslab-etcd3==0.12.1"
    ) from error
