"""Who has confirmed which address: opt-in cycles, their mails and the confirm page."""
