-- A store as version 0.1.0 wrote it: layout 1, every document in schema 1.
BEGIN TRANSACTION;
CREATE TABLE documents (
  container TEXT NOT NULL, partition TEXT NOT NULL, id TEXT NOT NULL,
  sort TEXT NOT NULL, due_at TEXT, expires_at TEXT, schema INTEGER NOT NULL, etag TEXT NOT NULL, body TEXT NOT NULL,
  PRIMARY KEY (container, partition, id)
) WITHOUT ROWID;
INSERT INTO "documents" VALUES('bars','AAPL|1d','AAPL|1d|r0|2013-01-01','2013-01-01T00:00:00.000000Z|AAPL|1d|r0|2013-01-01',NULL,NULL,1,'2124447e011f42f99b2e71f356d03816','{"name":"2013-01-01","revision":0,"start":22616640,"recorded_at":"2026-11-21T09:00:00Z","opened":[2310,3750,5190],"closed":[2700,4140,5580],"open":[100.0,101.0,102.0],"high":[101.0,102.0,103.0],"low":[99.0,100.0,101.0],"close":[100.0,101.0,102.0],"volume":[1000.0,1000.0,1000.0],"split":{}}');
INSERT INTO "documents" VALUES('series','AAPL|1d','AAPL|1d','2026-11-21T09:00:00.000000Z|AAPL|1d','2013-01-05T21:00:00.000000Z',NULL,1,'0b455cfaa7cc482fbabe4e138a7c92fe','{"symbol":"AAPL","interval":"1d","live_from":"2013-01-02T21:00:00Z","is_active":true,"watched_by":"file","evaluated_through":"2013-01-04T21:00:00Z","provider":"alpha_vantage","adjustment":"raw","revision":0,"misses":0,"trouble":null,"entries":{}}');
INSERT INTO "documents" VALUES('things','p','d0','2026-11-21T09:00:00.000000Z|d0',NULL,'2020-01-01T00:00:00.000000Z',1,'f25e9adcde1745478f74cb69391d2d86','{"n":0,"said":"Zürich"}');
INSERT INTO "documents" VALUES('things','p','d1','2026-11-21T09:00:01.000000Z|d1',NULL,'2099-01-01T00:00:00.000000Z',1,'d7bcdf62c396494c9308da1678d07683','{"n":1,"said":"Zürich"}');
INSERT INTO "documents" VALUES('things','p','d2','2026-11-21T09:00:02.000000Z|d2',NULL,NULL,1,'72f836c6a2c644689f50a963c8e82b7d','{"n":2,"said":"Zürich"}');
INSERT INTO "documents" VALUES('things','p','d3','2026-11-21T09:00:03.000000Z|d3',NULL,NULL,1,'f735585a4a4a4e03acef55fd1427694a','{"n":3,"said":"Zürich"}');
CREATE INDEX documents_by_partition ON documents (container, partition, sort);
CREATE UNIQUE INDEX documents_by_sort ON documents (container, sort);
CREATE INDEX documents_by_due_at ON documents (container, due_at) WHERE due_at IS NOT NULL;
COMMIT;
PRAGMA user_version=1;
