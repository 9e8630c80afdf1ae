"""How a study is shown: tables, figures, pages. No torch."""
