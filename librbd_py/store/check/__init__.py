"""Verification of what RBD keeps in a store, of whatever kind: `images`, `groups` and `leftovers` read it through
`records.Records`, `pools` runs them over any store that is a client's."""
