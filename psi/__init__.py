"""Which rows the parties share: private set intersection and its evidence."""
