"""TeaCache for ConsisID: identity-preserving videos in a half to a third of the time."""
