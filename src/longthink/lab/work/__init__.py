"""Work that a model does in pieces, resumable: in this process, in several, or on a Ray cluster."""
