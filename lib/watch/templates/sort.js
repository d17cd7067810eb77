window.sdSort = function (button) {
  var head = button.closest("th"), body = head.closest("table").tBodies[0];
  var column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  head.parentNode.querySelectorAll("th").forEach(function (th) { th.removeAttribute("aria-sort"); });
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  var value = function (row) {
    var cell = row.cells[column], number = cell.getAttribute("data-sort");
    return number === null ? cell.textContent.trim().toLowerCase() : parseFloat(number);
  };
  Array.from(body.rows).sort(function (a, b) {
    var x = value(a), y = value(b);
    var order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
    return down ? -order : order;
  }).forEach(function (row) { body.appendChild(row); });
};
