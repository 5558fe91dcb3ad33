"""Who talks, and how: identities, agreements, messages, links, sessions, evidence. Knows no protocol."""
