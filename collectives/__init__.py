"""Row collectives and step boards; import the transport you need."""
