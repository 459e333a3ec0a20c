"""The laboratory's commands; `longthink.cli.app` names them and imports each when it is used."""
