"""Alerts: rules over what is recorded, raised and cleared as events, and sent to whoever is to hear of them."""
