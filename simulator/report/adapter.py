from fedtap.simulator.federation.settings import Federation
from fedtap.simulator.report import defence_report, page, privacy_report


def write(folder, about, settings, pictures, charts):
    if isinstance(settings[0], Federation):
        page.write(folder.path, about, folder.rows, pictures)
        return
    if pictures:
        folder.write("strip.png", page.strip(pictures))
    from html import escape

    folder.write(
        "report.html",
        page.page(
            about,
            [page.gallery(pictures), *(f"<h2>{escape(h)}</h2><div class='chart'>{c}</div>" for h, c in charts.items())],
        ).encode(),
    )


def said(rows, settings):
    if isinstance(settings[0], Federation):
        yield privacy_report.table(rows) if privacy_report.told(rows) else page.table(rows)
        if defence_report.told(rows):
            yield defence_report.table(rows)
        yield from (f"⚠ {sentence}" for sentence in page.alarms(rows))
        yield from page.answers(rows)
