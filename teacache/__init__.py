"""TeaCache for ConsisID: identity-preserving videos, faster, from one photograph and a prompt."""
