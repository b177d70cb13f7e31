"""What is made of result rows: tables, plots, filed results, the README's section, goals and evidence."""
