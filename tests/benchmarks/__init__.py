"""What stepclaim costs against the bare stub, measured side by side."""
