"""The layout-free checkpoint store."""
