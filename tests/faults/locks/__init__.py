"""Other projects' locks beside our store: what each does when a reply is lost, and when its holder was stopped."""
