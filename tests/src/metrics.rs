//! Reads the Prometheus text of `/metrics`. Read [`Metrics`].

/// One line of the text.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample {
    /// Name of the metric.
    pub name: String,
    /// Label pairs in the order of the line.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// Everything that a server told at one moment.
#[derive(Clone, PartialEq, Debug)]
pub struct Metrics(Vec<Sample>);

impl Metrics {
    /// Reads the text; a line that is no sample is an error.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines
            .map(|line| sample(line).ok_or_else(|| format!("not a sample: {line:?}")))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// All samples of one metric.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The sum over all samples of one metric; panics if there is none, because a misspelt name would pass any test.
    pub fn sum(&self, name: &str) -> f64 {
        assert!(self.all(name).next().is_some(), "no metric is called {name}");
        self.all(name).map(|sample| sample.value).sum()
    }

    /// The sum over the samples whose label has this value.
    pub fn sum_where(&self, name: &str, label: &str, value: &str) -> f64 {
        assert!(self.all(name).next().is_some(), "no metric is called {name}");
        self.all(name).filter(|sample| sample.label(label) == Some(value)).map(|sample| sample.value).sum()
    }
}

fn sample(line: &str) -> Option<Sample> {
    // A label's value may hold braces: a route's template, say.
    let (series, value) = match line.rfind('}') {
        Some(end) => line.split_at(end + 1),
        None => line.split_at(line.find(' ')?),
    };
    // A timestamp may follow the value.
    let value = value.split_whitespace().next()?.parse().ok()?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, self::labels(labels.strip_suffix('}')?)?),
        None => (series, Vec::new()),
    };
    Some(Sample { name: name.trim().to_owned(), labels, value })
}

fn labels(mut text: &str) -> Option<Vec<(String, String)>> {
    let mut labels = Vec::new();
    while !text.trim_matches([',', ' ']).is_empty() {
        let (name, rest) = text.trim_start_matches([',', ' ']).split_once("=\"")?;
        let end = rest.char_indices().find(|(i, c)| *c == '"' && !rest[..*i].ends_with('\\'))?.0;
        labels.push((name.to_owned(), rest[..end].replace("\\\"", "\"").replace("\\\\", "\\")));
        text = &rest[end + 1..];
    }
    Some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read() {
        let text =
            "# HELP a b\n# TYPE a counter\na{node=\"x-0\",role=\"decode\"} 3\na{node=\"y\\\"\"} 1.5 1700000\nb 2\n";
        let metrics = Metrics::parse(text).expect("is valid");
        assert_eq!(metrics.sum("a"), 4.5);
        assert_eq!(metrics.sum_where("a", "role", "decode"), 3.0);
        assert_eq!(metrics.all("a").nth(1).and_then(|s| s.label("node")), Some("y\""));
        assert_eq!(metrics.sum("b"), 2.0);
        let metrics = Metrics::parse("a{path=\"/v1/{id}/x\"} 1").expect("is valid");
        assert_eq!(metrics.all("a").next().and_then(|s| s.label("path")), Some("/v1/{id}/x"));
        assert!(Metrics::parse("nonsense").is_err());
    }

    #[test]
    #[should_panic(expected = "no metric is called c")]
    fn unknown_names_are_mistakes() {
        Metrics::parse("b 2").expect("is valid").sum("c");
    }
}
