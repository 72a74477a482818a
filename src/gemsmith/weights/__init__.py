"""From files to a ready module and back: names, loading, saving, the hub, the PLE store."""
