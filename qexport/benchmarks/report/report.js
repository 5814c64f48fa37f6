"use strict";
// Tables sort by a click or by the keyboard on a column's head, and filter by text and by chosen columns.
// Without this script every table is still there, whole.
(function () {
  function valueOf(row, column, numeric) {
    const cell = row.cells[column];
    const text = cell.hasAttribute("data-value") ? cell.getAttribute("data-value") : cell.textContent.trim();
    if (!numeric) return text;
    const number = Number(text);
    return text === "" || Number.isNaN(number) ? null : number;
  }

  function compare(one, other) {
    if (typeof one === "number") return one - other;
    return one.localeCompare(other, "en", { numeric: true });
  }

  function sortBy(table, head) {
    const column = head.cellIndex;
    const numeric = head.dataset.sort === "num";
    const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", next);
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row, place) => ({ row, place, value: valueOf(row, column, numeric) }));
    rows.sort((one, other) => {
      // What was not measured stands last in either direction.
      if (one.value === null || other.value === null) {
        return (one.value === null) - (other.value === null) || one.place - other.place;
      }
      const order = compare(one.value, other.value);
      return (next === "ascending" ? order : -order) || one.place - other.place;
    });
    for (const item of rows) body.appendChild(item.row);
  }

  function makeSortable(table) {
    for (const head of table.tHead.rows[0].cells) {
      if (!head.dataset.sort) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(table, head));
    }
  }

  function labelled(text, control) {
    const label = document.createElement("label");
    label.append(text, control);
    return label;
  }

  function choices(table, key) {
    const cells = table.tBodies[0].querySelectorAll('td[data-key="' + key + '"]');
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    for (const text of new Set(Array.from(cells, (cell) => cell.textContent.trim()))) select.append(new Option(text, text));
    return select;
  }

  function makeFilterable(table) {
    const controls = document.createElement("div");
    controls.className = "controls";
    const search = document.createElement("input");
    search.type = "search";
    search.placeholder = "path, kernel, …";
    controls.append(labelled("Filter", search));
    const selects = [];
    for (const head of table.tHead.rows[0].cells) {
      if (!head.dataset.key) continue;
      const select = choices(table, head.dataset.key);
      selects.push({ column: head.cellIndex, select });
      controls.append(labelled(head.textContent.trim(), select));
    }
    const shown = document.createElement("output");
    controls.append(shown);

    function apply() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let visible = 0;
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden =
          !words.every((word) => text.includes(word)) ||
          !selects.every(({ column, select }) => !select.value || row.cells[column].textContent.trim() === select.value);
        if (!row.hidden) visible += 1;
      }
      shown.textContent = visible + " of " + table.tBodies[0].rows.length + " rows";
    }
    search.addEventListener("input", apply);
    for (const { select } of selects) select.addEventListener("change", apply);
    const holder = table.closest(".scroll") || table;
    holder.before(controls);
    apply();
  }

  document.querySelectorAll("table.sortable").forEach(makeSortable);
  document.querySelectorAll("table.filterable").forEach(makeFilterable);
  document.documentElement.dataset.script = "ready";
})();
